"""Train a DeepSIC model: data, phases, checkpoints, model file.

    deepsic train --images photos.zip scenes/ --labels tiles.zip --out mine.safetensors
    deepsic train --images photos.zip scenes/ --labels tiles.zip --out mine.safetensors --resume
    deepsic train --from base --labels my-tiles/ --out my.safetensors
    deepsic train --from base --encoder-minutes 30 --images scenes/ --out my.safetensors

Every image of a batch has its own random quality, so that one model serves all qualities. From Python:
`train(Settings(images=["photos.zip"], out="my.safetensors"))`.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepsic_codec.errors import ConfigurationError, counted
from deepsic_codec.model.file import ModelInfo
from deepsic_codec.progress import Progress
from deepsic_codec.training import checkpoint
from deepsic_codec.training.data import LabelledTiles, Photographs
from deepsic_codec.training.finish import write_adapted, write_model
from deepsic_codec.training.interrupt import Interrupt
from deepsic_codec.training.log import Log, Row
from deepsic_codec.training.measure import measure
from deepsic_codec.training.phases import FLOATING, PHASES, Phase, planned
from deepsic_codec.training.process_group import ProcessGroup
from deepsic_codec.training.run import Run, architecture_of
from deepsic_codec.training.settings import Settings
from deepsic_codec.training.soap import Soap
from deepsic_codec.training.start import base_model, load_state, prior_of, starting_networks

#: Weight of the past in the averages of the networks, which the next phase and the model file get.
AVERAGE_DECAY = 0.999
#: Largest norm of the gradient; larger ones are scaled down.
MAX_NORM = 1.0
#: Steps of progress that a phase reports.
PROGRESS_STEPS = 1000


def train(
    s: Settings, resume: bool = False, report: Callable[[str], None] = print, progress: Progress | None = None
) -> ModelInfo:
    """Run all phases and write the model file.

    Parameters
    ----------
    s : Settings
        Settings of the run.
    resume : bool
        Continue from the run's checkpoint, exactly where it was written.
    report : callable
        Takes each line of text for people.
    progress : Progress, optional
        Called after each step with thousandths of the whole run.

    Raises
    ------
    ConfigurationError
        For data, settings or a checkpoint that cannot be trained with; before training starts.
    KeyboardInterrupt
        After Ctrl-C, when the checkpoint is written.
    """
    base = base_model(s)
    state = checkpoint.load(s.folder) if resume else None
    if not resume and (s.folder / checkpoint.FOLDER).exists():
        raise ConfigurationError(f"{s.folder} has a checkpoint: add --resume to continue, or name another --run")
    s.folder.mkdir(parents=True, exist_ok=True)
    Path(s.out).resolve().parent.mkdir(parents=True, exist_ok=True)
    log = Log(s.folder, report)
    run = _prepare(s, base, log, resumed=state is not None)
    names = planned(run)
    if state is not None:
        _continue_log(s, state, names, log)
    log.say(f"{s.name}: {', '.join(names)} on {run.device}; run in {s.folder}")
    with _matmul_precision(run.device), _memory_advice(s), _threads(1 if s.processes > 1 else s.threads):
        if s.trains_encoder and state is None:  # the figures to improve on
            rows = measure(run, run.nets.state_dict(), quantised=True)
            log.add_held_out([{"phase": "encoder", "step": 0} | row for row in rows])
        for number, name in enumerate(names):
            if state is not None and names.index(state.phase) > number:
                continue
            phase_state = state if state is not None and state.phase == name else None
            if phase_state is not None:
                load_state(run.nets, phase_state.below("net"), s.folder)
                run.nets.integer = name not in FLOATING and run.nets.stores_integers
                run.saved_prior = phase_state.below("phase")
                if phase_state.done:
                    continue
            torch.manual_seed(s.seed + number)
            run.nets.requires_grad_(False)
            phase = PHASES[name](run)
            part = None if progress is None else _part(progress, number, len(names))
            optimise(run, phase, np.random.default_rng((s.seed, number)), log, phase_state, part)
        run.nets.requires_grad_(False).eval()
        with _all_cores(s):
            return write_adapted(run, base, log) if base else write_model(run, log)


def _prepare(s: Settings, base: ModelInfo | None, log: Log, resumed: bool) -> Run:
    """Read the data, make the networks and write the settings of the run."""
    device = _device(s)
    _check_processes(s, device)  # and the name of the architecture: before images are read
    if base is None:
        architecture_of(s, classes=0)
    photos = Photographs(s.images, s.crop, device=device, keep=s.data_device) if s.images else None
    tiles = LabelledTiles(s.labels, root=s.label_root, device=device, keep=s.data_device) if s.labels else None
    _report_data(s, photos, tiles, log)
    torch.manual_seed(s.seed)
    nets = starting_networks(s, base, photos, tiles, resumed)
    nets.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    description = {
        "settings": asdict(s),
        "architecture": nets.arch.to_json(),
        "classes": tiles.classes if tiles else [],
        "decoder": base.decoder if base else "",
        "bounded": nets.bounded,
    }
    if resumed:
        nets.bounded = description["bounded"] = _check_same(s, description)
    (s.folder / "settings.json").write_text(json.dumps(description, indent=1))
    return Run(s, nets, photos, tiles, device, *(prior_of(base) if base else ()))


def _continue_log(s: Settings, state: checkpoint.State, names: list[str], log: Log) -> None:
    if state.phase not in names:
        raise ConfigurationError(
            f"{s.folder}: the checkpoint is of phase {state.phase!r}, which these settings leave out; "
            f"their phases: {', '.join(names) or 'none'}"
        )
    log.rewind(names, state.phase, state.step)
    log.say(f"resuming in phase {state.phase} after step {state.step}")


def optimise(
    run: Run,
    phase: Phase,
    rng: np.random.Generator,
    log: Log,
    state: checkpoint.State | None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Run one phase from its start or from a checkpoint. Leaves the averaged networks in `run.nets`."""
    trainer = Trainer(run, phase, rng, log, state)
    s = run.settings
    # processes are forked here, before this process has threads
    group = ProcessGroup(phase.step, trainer.parameters, s.processes, (s.seed, *phase.name.encode()))
    with group, Interrupt() as interrupt:
        while not trainer.is_done:
            trainer.step(group)
            if progress is not None:
                progress(trainer.progress)
            if trainer.checkpoint_is_due:
                trainer.measure()
                trainer.save()
            if interrupt.requested:
                trainer.save()
                log.say(f"interrupted after step {trainer.number} of {phase.name}; continue: --resume --run {s.folder}")
                raise KeyboardInterrupt
    run.nets.load_state_dict(trainer.averages)
    trainer.measure()
    trainer.save(done=True)


class Trainer:
    """One phase in progress: optimiser, averages, log rows, checkpoints.

    Parameters
    ----------
    run : Run
    phase : Phase
    rng : Generator
        Draws the data of each step.
    log : Log
    state : State or None
        Checkpoint to continue from.
    """

    def __init__(
        self, run: Run, phase: Phase, rng: np.random.Generator, log: Log, state: checkpoint.State | None
    ) -> None:
        self.run, self.phase, self.rng, self.log = run, phase, rng, log
        self.parameters = [p.requires_grad_(True) for group in phase.groups for p in group["params"]]
        self.optimiser = _optimiser(phase, run.device)
        self.averages = {name: value.detach().clone() for name, value in run.nets.state_dict().items()}
        self.number = 0  # steps that are done
        self._history: list[Tensor] = []  # measures of the steps since the last row of the log
        self._seconds_before = 0.0
        if state is not None:
            checkpoint.restore(state, run.nets, self.averages, self.optimiser, rng, self._history)
            self.number, self._seconds_before = state.step, state.seconds
        self._start = self._saved = time.monotonic()
        self._window = (self._start, self.number)  # time and step from which speed is measured

    @property
    def seconds(self) -> float:
        """Time that the phase has taken, before a checkpoint too."""
        return self._seconds_before + time.monotonic() - self._start

    @property
    def progress(self) -> float:
        """Share of the budget that is spent: of the steps or of the minutes, whichever is larger."""
        steps, seconds = self.phase.steps, 60 * self.phase.minutes
        return max(self.number / max(1e-9, steps), self.seconds / max(1e-9, seconds))

    @property
    def is_done(self) -> bool:
        """Whether the budget is spent."""
        return not self.phase.steps or not self.phase.minutes or self.progress >= 1

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether the settings ask for a checkpoint after this step."""
        s = self.run.settings
        late = time.monotonic() - self._saved > 60 * s.checkpoint_minutes
        return late or bool(s.checkpoint_steps and self.number % s.checkpoint_steps == 0)

    def step(self, group: ProcessGroup) -> None:
        """Take one step of the optimiser, and log it where a row is due."""
        s, phase = self.run.settings, self.phase
        rate = phase.lr * schedule(self.progress, self.number, s.warm_up)
        for options in self.optimiser.param_groups:
            options["lr"] = rate * options["factor"]
        self.optimiser.zero_grad(set_to_none=True)
        measures = group.step(self.number, self.rng)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        if torch.isfinite(norm):
            with _all_cores(s):  # of the other processes, which wait
                self.optimiser.step()
        self.number += 1
        decay = min(AVERAGE_DECAY, (1 + self.number) / (10 + self.number))
        _average(self.averages, self.run.nets.state_dict(), 1 - decay)
        measures["grad"] = norm.detach()
        self._history.append(torch.stack([value.float() for value in measures.values()]))
        if self.number % s.every == 0 or self.number == phase.steps:
            self._log_row(list(measures), rate)

    def _log_row(self, names: list[str], rate: float) -> None:
        now, (since, first) = time.monotonic(), self._window
        means = torch.stack(self._history).mean(0).tolist()
        row: Row = {"phase": self.phase.name, "step": self.number, "minutes": self.seconds / 60}
        row |= _figures(dict(zip(names, means, strict=True)))
        speed = self.phase.images * (self.number - first) / (now - since)
        self.log.add(row | {"lr": rate, "images_per_second": speed})
        self._history.clear()
        self._window = now, self.number

    def measure(self) -> None:
        """Log figures of the averages on held-out data."""
        run, name = self.run, self.phase.name
        # the prior of a model file is integers from the first step
        quantised = run.estimates_rate if run.settings.base else name not in (*FLOATING, "integer")
        with _all_cores(run.settings):
            rows = measure(run, self.averages, quantised)
        self.log.add_held_out([{"phase": name, "step": self.number} | row for row in rows])

    def save(self, done: bool = False) -> None:
        """Write a checkpoint and the log."""
        tensors = checkpoint.training_tensors(self.run.nets, self.averages, self.optimiser, self._history)
        tensors |= {f"phase.{name}": value for name, value in self.phase.saved.items()}
        data_rng = dict(self.rng.bit_generator.state)
        state = checkpoint.State(self.phase.name, self.number, self.seconds, tensors, data_rng, done)
        checkpoint.save(self.run.settings.folder, state)
        self.log.write()
        self._saved = time.monotonic()
        self._window = self._saved, self.number


def schedule(progress: float, step: int, warm_up: int) -> float:
    """Return the share of the learning rate: it rises for `warm_up` steps or a tenth of the phase, then falls to 1 %.

    The fall is half a cosine.
    """
    rise = min(1.0, max((step + 1) / max(1, warm_up), 10 * progress))
    return max(0.01, 0.5 * (1 + math.cos(math.pi * progress))) * rise


def _part(progress: Progress, number: int, count: int) -> Callable[[float], None]:
    """Return a callback for the progress of one phase, each of which counts as much as any other."""

    def report(share: float) -> None:
        progress(int(PROGRESS_STEPS * (number + min(1.0, share)) / count), PROGRESS_STEPS)

    return report


def _optimiser(phase: Phase, device: str) -> torch.optim.Optimizer:
    if phase.name == "head":  # its settings were chosen with Adam
        return torch.optim.AdamW(phase.groups, lr=phase.lr, weight_decay=0.0, fused=device.startswith("cuda"))
    return Soap(phase.groups, phase.lr)


@torch.no_grad()
def _average(averages: dict[str, Tensor], current: dict[str, Tensor], weight: float) -> None:
    """Move the averages towards the current values; counters (of batch normalisation) are copied."""
    real = [name for name, value in averages.items() if value.is_floating_point()]
    torch._foreach_lerp_([averages[name] for name in real], [current[name] for name in real], weight)
    for name in averages.keys() - set(real):
        averages[name].copy_(current[name])


def _figures(means: dict[str, float]) -> dict[str, float]:
    """Return columns of the log: mean squared errors become PSNR in dB."""
    figures = {}
    for name, value in means.items():
        if name.endswith("mse"):
            name, value = name.replace("mse", "psnr"), 10 * math.log10(255**2 / max(value, 1e-9))
        figures[name] = value
    return figures


def _device(s: Settings) -> str:
    if s.device != "auto":
        if s.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigurationError(f"device: {s.device} needs a CUDA device, and there is none; use --device cpu")
        return s.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_processes(s: Settings, device: str) -> None:
    if s.processes == 1:
        return
    if device != "cpu" or not hasattr(os, "fork"):
        raise ConfigurationError(
            "processes: several processes need a CPU and a system that can fork; leave out --processes"
        )


def _report_data(s: Settings, photos: Photographs | None, tiles: LabelledTiles | None, log: Log) -> None:
    if photos:
        pool = photos.pool
        log.say(
            f"{counted(len(pool.shortest), 'image')} ({pool.nbytes / 1e6:.0f} MB on {pool.flat.device}), "
            f"{len(photos.held_out)} held out"
        )
    if tiles:
        log.say(
            f"{counted(len(tiles.labels), 'labelled image')} of {counted(len(tiles.classes), 'class', 'classes')}, "
            f"{len(tiles.test_labels)} held out: {', '.join(tiles.classes)}"
        )
        unknown = sorted({c for children in s.parents.values() for c in children} - set(tiles.classes))
        if unknown:
            raise ConfigurationError(
                f"parents: no class named {', '.join(unknown)}; classes: {', '.join(tiles.classes)}"
            )
        if not photos:
            log.say("no --images: the head cannot learn the class unknown")
    elif s.parents:
        raise ConfigurationError("parents: there are no labels to name; add --labels")
    skipped = [name for data in (photos, tiles) if data for name in data.skipped]
    if skipped:
        (s.folder / "skipped.txt").write_text("\n".join(skipped) + "\n")
        log.say(f"skipped {counted(len(skipped), 'unreadable image')} (all in {s.folder / 'skipped.txt'}):")
        for name in skipped[:10]:
            log.say(f"  {name}")


def _check_same(s: Settings, description: dict[str, object]) -> bool:
    """Refuse to resume with other networks, classes or base model; return whether the run's networks are bounded."""
    stored = json.loads((s.folder / "settings.json").read_text())
    for key in ("architecture", "classes", "decoder"):
        if stored.get(key) != description[key]:
            raise ConfigurationError(
                f"{s.folder}: {key} of the checkpoint is {stored.get(key)}, but the settings have "
                f"{description[key]}; name another --run"
            )
    before = Settings(**stored["settings"])
    if s.base and before.trains_encoder != s.trains_encoder:
        raise ConfigurationError(f"{s.folder}: resume the run as it began, with or without --encoder-minutes")
    return bool(stored["bounded"])


def _all_cores(s: Settings) -> AbstractContextManager[None]:
    """Use the cores of all processes in this one, while the others wait."""
    return _threads(s.processes if s.processes > 1 else 0)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use this many threads; 0: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _matmul_precision(device: str) -> Iterator[None]:
    """Let CUDA use TF32 during training only: products of integers elsewhere must be exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.startswith("cuda") else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _memory_advice(s: Settings) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigurationError(
            f"out of device memory: lower --photos-per-step (now {s.photos_per_step}), --mosaics-per-step (now "
            f"{s.mosaics_per_step}) or --crop (now {s.crop}), or keep the images elsewhere with --data-device cpu "
            f"({str(error).splitlines()[0]})"
        ) from error
