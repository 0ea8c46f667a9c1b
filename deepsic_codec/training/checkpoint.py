"""Checkpoints of a run: everything that the next step depends on, in files of at most 16 MiB.

A checkpoint is a folder with `state.json` (phase, step, seconds, the data generator) and numbered safetensors files
(networks, averages, the optimiser's moments, states of torch's generators). It is written beside the previous one and
then renamed, so that an interrupted run always has one of the two.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.family import below

#: Largest file in bytes, which must fit through the limits of lent machines.
MAX_SHARD = 15 << 20
FOLDER = "checkpoint"

Tensors = dict[str, Tensor]


@dataclass
class State:
    """The state of a run after a step.

    Attributes
    ----------
    phase : str
    step : int
        Steps of this phase that are done.
    seconds : float
        Time that they took.
    tensors : dict of str to Tensor
        `net.*`, `ema.*`, `optimiser.<i>.*`, `rng.*`, `history` and `phase.*`.
    data_rng : dict
        State of the numpy generator that draws the data.
    done : bool
        Whether the phase is over; then `net.*` are its averaged networks.
    """

    phase: str
    step: int
    seconds: float
    tensors: Tensors
    data_rng: dict[str, Any]
    done: bool = False

    def below(self, prefix: str) -> Tensors:
        """Return the tensors whose names start with a prefix and a dot, without them."""
        return below(self.tensors, prefix)


def training_tensors(
    nets: nn.Module, averages: Tensors, optimiser: torch.optim.Optimizer, history: list[Tensor]
) -> Tensors:
    """Return the tensors that the next step depends on, by their names in a checkpoint."""
    tensors = {f"net.{k}": v for k, v in nets.state_dict().items()} | {f"ema.{k}": v for k, v in averages.items()}
    for i, slots in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{k}": v for k, v in slots.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if history:
        tensors["history"] = torch.stack(history)
    return tensors


def restore(
    state: State,
    nets: nn.Module,
    averages: Tensors,
    optimiser: torch.optim.Optimizer,
    rng: np.random.Generator,
    history: list[Tensor],
) -> None:
    """Bring everything that a step depends on into the state of a checkpoint."""
    nets.load_state_dict(state.below("net"))
    for name, value in state.below("ema").items():
        averages[name].copy_(value)
    slots: dict[int, Tensors] = {}
    for name, value in state.below("optimiser").items():
        number, slot = name.split(".", 1)
        slots.setdefault(int(number), {})[slot] = value
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})
    torch.set_rng_state(state.tensors["rng.cpu"])
    if "rng.cuda" in state.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.tensors["rng.cuda"])
    rng.bit_generator.state = state.data_rng
    device = next(nets.parameters()).device
    history[:] = list(state.tensors["history"].to(device)) if "history" in state.tensors else []


def save(run: Path, state: State) -> None:
    """Write a checkpoint into a run's folder, in place of the previous one."""
    part, final, old = (run / f"{FOLDER}{end}" for end in (".part", "", ".old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shards = list(_shards(state.tensors))
    for number, names in enumerate(shards):
        # the format wants tensors that share no memory
        shard = {name: state.tensors[name].detach().cpu().contiguous().clone() for name in names}
        save_file(shard, part / f"{number}.safetensors")
    description = {name: value for name, value in vars(state).items() if name != "tensors"}
    (part / "state.json").write_text(json.dumps(description | {"files": len(shards)}))
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)


def load(run: Path) -> State | None:
    """Return the latest checkpoint of a run, or None if it has none.

    Raises
    ------
    ConfigurationError
        If the checkpoint is damaged.
    """
    # between the two renames of `save`, only the old one exists
    for folder in (run / FOLDER, run / f"{FOLDER}.old"):
        if not folder.is_dir():
            continue
        try:
            description = json.loads((folder / "state.json").read_text())
            tensors: Tensors = {}
            for number in range(description.pop("files")):
                tensors |= load_file(folder / f"{number}.safetensors")
            return State(tensors=tensors, **description)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ConfigurationError(f"{folder}: damaged checkpoint ({type(error).__name__}: {error})") from None
    return None


def _shards(tensors: Tensors) -> Iterator[list[str]]:
    """Yield the names of tensors of at most MAX_SHARD bytes in total; a larger tensor has a file of its own."""
    names: list[str] = []
    size = 0
    for name, value in tensors.items():
        if names and size + value.nbytes > MAX_SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += value.nbytes
    yield names
