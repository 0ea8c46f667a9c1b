"""Checkpoints of a run: everything that the next step depends on, in files of at most 16 MiB.

A checkpoint is a folder with ``state.json`` (phase, step, seconds, the data generator) and
numbered safetensors files: networks, their average, the optimiser's moments, and the states
of torch's generators.  No pickle.  It is written beside the one before and renamed, so
that an interrupted run has one of the two.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepsic_codec.errors import ConfigurationError

#: What fits through the file limits of lent machines.
MAX_SHARD = 15 << 20
FOLDER = "checkpoint"

Tensors = dict[str, Tensor]


@dataclass
class State:
    """Where a run is.

    Attributes
    ----------
    phase : str
        Name of the phase.
    step : int
        Steps of this phase that are done.
    seconds : float
        Time that they took.
    tensors : dict of str to Tensor
        ``net.*``, ``ema.*``, ``optimiser.<i>.*``, ``rng.*``, ``history``.
    data_rng : dict
        State of the numpy generator that draws the data.
    done : bool
        Whether the phase is over: ``net.*`` are its averaged networks then.
    """

    phase: str
    step: int
    seconds: float
    tensors: Tensors = field(default_factory=dict)
    data_rng: dict[str, Any] = field(default_factory=dict)
    done: bool = False

    def below(self, prefix: str) -> Tensors:
        """Tensors whose names start with a prefix and a dot, without them."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}


def capture(
    phase: str,
    step: int,
    seconds: float,
    nets: nn.Module,
    shadow: Tensors,
    optimiser: torch.optim.Optimizer,
    rng: np.random.Generator,
    history: list[Tensor],
) -> State:
    """Everything that the step after this one depends on."""
    tensors = {f"net.{k}": v for k, v in nets.state_dict().items()} | {f"ema.{k}": v for k, v in shadow.items()}
    for i, slots in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{k}": v for k, v in slots.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if history:
        tensors["history"] = torch.stack(history)
    return State(phase, step, seconds, tensors, dict(rng.bit_generator.state))


def restore(
    state: State,
    nets: nn.Module,
    shadow: Tensors,
    optimiser: torch.optim.Optimizer,
    rng: np.random.Generator,
    history: list[Tensor],
) -> None:
    """Inverse of :func:`capture`."""
    try:
        nets.load_state_dict(state.below("net"))
    except RuntimeError as error:
        raise ConfigurationError(f"the checkpoint does not fit the architecture: {error}") from None
    for name, value in state.below("ema").items():
        shadow[name].copy_(value)
    described = optimiser.state_dict()
    slots: dict[int, Tensors] = {}
    for name, value in (state.below("optimiser") | state.below("adam")).items():
        number, slot = name.split(".", 1)
        slots.setdefault(int(number), {})[slot] = value
    optimiser.load_state_dict({"state": slots, "param_groups": described["param_groups"]})
    torch.set_rng_state(state.tensors["rng.cpu"])
    if "rng.cuda" in state.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.tensors["rng.cuda"])
    rng.bit_generator.state = state.data_rng
    device = next(nets.parameters()).device
    history[:] = list(state.tensors["history"].to(device)) if "history" in state.tensors else []


def save(run: Path, state: State) -> None:
    """Write a checkpoint into a run's folder, in place of the one before."""
    part, final, old = (run / f"{FOLDER}{end}" for end in (".part", "", ".old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    count = 0
    for count, shard in enumerate(_shards(state.tensors), 1):  # noqa: B007
        save_file(shard, part / f"{count - 1}.safetensors")
    about = {
        "phase": state.phase,
        "step": state.step,
        "seconds": state.seconds,
        "files": count,
        "done": state.done,
        "data_rng": state.data_rng,
    }
    (part / "state.json").write_text(json.dumps(about))
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)


def load(run: Path) -> State | None:
    """The latest checkpoint of a run, or None if it has none.

    Raises
    ------
    ConfigurationError
        If the checkpoint is damaged.
    """
    # between two renames only the old one has its name
    for folder in (run / FOLDER, run / f"{FOLDER}.old"):
        if not folder.is_dir():
            continue
        try:
            about = json.loads((folder / "state.json").read_text())
            tensors: Tensors = {}
            for i in range(about["files"]):
                tensors |= load_file(folder / f"{i}.safetensors")
            return State(about["phase"], about["step"], about["seconds"], tensors, about["data_rng"], about["done"])
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ConfigurationError(f"{folder}: damaged checkpoint ({type(error).__name__}: {error})") from None
    return None


def _shards(tensors: Tensors) -> Iterator[Tensors]:
    """Parts of at most MAX_SHARD bytes; a single larger tensor is a part of its own."""
    shard: Tensors = {}
    size = 0
    for name, value in tensors.items():
        held = value.detach().cpu().contiguous()
        if shard and size + held.nbytes > MAX_SHARD:
            yield shard
            shard, size = {}, 0
        # a copy: averages that share memory with nothing are what the format wants
        shard[name] = held.clone()
        size += held.nbytes
    yield shard
