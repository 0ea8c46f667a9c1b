r"""Train a DeepSIC model: data, phases, checkpoints, model file.

    deepsic train --images photos.zip scenes/ --labels tiles.zip --out base.safetensors
    deepsic train --images photos.zip scenes/ --labels tiles.zip --out base.safetensors --resume
    deepsic train --from base --labels my-tiles/ --out my.safetensors
    deepsic train --from base --encoder-minutes 30 --images scenes/ --out my.safetensors

Every image of a batch gets its own random quality, so one run covers all of them.  The
same from Python: ``train(Settings(images=["photos.zip"], out="my.safetensors"))``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.families import architecture_from, family_of
from deepsic_codec.model.file import ModelInfo, load_arrays, read_info
from deepsic_codec.model.zoo import find_model
from deepsic_codec.training import checkpoint
from deepsic_codec.training.data import LabelledTiles, Photographs
from deepsic_codec.training.finish import write_adapted, write_model
from deepsic_codec.training.grow import grow
from deepsic_codec.training.klt import linear_start
from deepsic_codec.training.loss import Networks, make_networks
from deepsic_codec.training.phases import FLOATING, Phase, Work, architecture_of
from deepsic_codec.training.progress import Bar, Interrupt, Log
from deepsic_codec.training.restore import restore
from deepsic_codec.training.settings import Settings
from deepsic_codec.training.soap import Soap
from deepsic_codec.training.team import Team


def train(s: Settings, resume: bool = False, console: Console | None = None) -> ModelInfo:
    """Run all phases and write the model file.

    Parameters
    ----------
    s : Settings
        All choices.
    resume : bool
        Go on from the run's checkpoint, exactly where it was.
    console : Console, optional
        Where to show how it goes; standard output by default.

    Raises
    ------
    ConfigurationError
        For data, settings or a checkpoint that cannot be trained with; before training starts.
    KeyboardInterrupt
        After Ctrl-C; the checkpoint is written.
    """
    base = _base(s)
    state = checkpoint.load(s.folder) if resume else None
    if not resume and (s.folder / checkpoint.FOLDER).exists():
        raise ConfigurationError(f"{s.folder} has a checkpoint: add --resume to go on, or name another --run")
    s.folder.mkdir(parents=True, exist_ok=True)
    Path(s.out).resolve().parent.mkdir(parents=True, exist_ok=True)
    device = _device(s)
    log = Log(s.folder, console)
    photos = Photographs(s.images, s.crop, device=device, keep=s.data_device) if s.images else None
    tiles = None
    if s.labels:
        tiles = LabelledTiles(s.labels, root=s.label_root, device=device, keep=s.data_device)
    _report_data(s, photos, tiles, log)
    nets = _networks(s, base, photos, tiles, fresh=state is None)
    _check_processes(s, nets, device)
    nets.to(device, memory_format=torch.channels_last)
    work = Work(s, nets, photos, tiles, device, _prior_of(base) if base else None)
    about = {
        "settings": asdict(s),
        "architecture": nets.arch.to_json(),
        "classes": tiles.classes if tiles else [],
        "decoder": base.decoder if base else "",
        "bounded": nets.bounded,
    }
    if state is not None:
        _check_same(s, about)
        nets.bounded = about["bounded"] = json.loads((s.folder / "settings.json").read_text()).get("bounded", False)
    (s.folder / "settings.json").write_text(json.dumps(about, indent=1))
    plan = work.plan()
    names = [name for name, _ in plan]
    if state is not None:
        if state.phase not in names:
            raise ConfigurationError(
                f"{s.folder}: the checkpoint is of phase {state.phase!r}, which these settings "
                f"leave out; phases: {', '.join(names) or 'none'}"
            )
        log.rewind(names, state.phase, state.step)
        log.say(f"resuming in phase {state.phase} after step {state.step}")
    compiled = s.compile and device.startswith("cuda") and _compile(nets)
    log.say(f"{s.name}: {', '.join(names)} on {device}{', compiled' if compiled else ''}; run in {s.folder}")
    with _matmul_precision(device), _memory_advice(s), _threads(1 if s.processes > 1 else s.threads):
        if s.trains_encoder and state is None:  # what there is to improve on
            rows = work.held_out(nets.state_dict(), quantised=True)
            log.add_held_out([{"phase": "encoder", "step": 0} | r for r in rows])
        for number, (name, make) in enumerate(plan):
            if state is not None and names.index(state.phase) > number:
                continue
            at_this = state if state is not None and state.phase == name else None
            if at_this is not None and at_this.done:
                _load(nets, at_this.below("net"), s.folder)
                nets.integer = name not in FLOATING and nets.stores_integers
                continue
            if at_this is not None:
                _load(nets, at_this.below("net"), s.folder)  # what the phase leaves alone, its data depend on
                nets.integer = name not in FLOATING and nets.stores_integers
                work.given = at_this.below("given")
            torch.manual_seed(s.seed + number)
            nets.requires_grad_(False)
            # other phases run in shapes that are not worth compiling for
            with nullcontext() if name in FLOATING else _eager():
                optimise(work, make(), np.random.default_rng((s.seed, number)), log, at_this)
        nets.requires_grad_(False).eval()
        with _eager(), _threads(s.processes if s.processes > 1 else 0):
            return write_adapted(work, base, log) if base else write_model(work, log)


def optimise(work: Work, phase: Phase, rng: np.random.Generator, log: Log, state: checkpoint.State | None) -> None:
    """Run one phase from its start or from a checkpoint; leaves the averaged networks."""
    s, nets, device = work.s, work.nets, work.device
    parameters = [p.requires_grad_(True) for group in phase.groups for p in group["params"]]
    optimiser = _optimiser(s, phase, device)
    shadow = {k: v.detach().clone() for k, v in nets.state_dict().items()}
    history: list[Tensor] = []
    step, before, names = 0, 0.0, []
    if state is not None:
        checkpoint.restore(state, nets, shadow, optimiser, rng, history)
        step, before = state.step, state.seconds
    start = saved = window = time.monotonic()
    window_step = step
    row: dict[str, object] = {"step": step}

    def all_cores() -> AbstractContextManager[None]:  # of the other processes, which wait
        return _threads(s.processes if s.processes > 1 else 0)

    def measure() -> None:
        with all_cores():
            rows = work.held_out(shadow, quantised=_is_quantised(phase, work))
        log.add_held_out([{"phase": phase.name, "step": step} | r for r in rows])

    def keep(done: bool = False) -> None:
        seconds = before + time.monotonic() - start
        state = checkpoint.capture(phase.name, step, seconds, nets, shadow, optimiser, rng, history)
        state.done = done
        state.tensors |= {f"given.{k}": v for k, v in phase.given.items()}
        checkpoint.save(s.folder, state)
        log.write()
        if s.plot:
            log.plot()

    team = Team(phase.step, parameters, s.processes, (s.seed, *phase.name.encode()))  # forks before there are threads
    with team, Interrupt() as interrupt, Bar(log.console, phase.name) as bar:
        while True:
            seconds = before + time.monotonic() - start
            progress = max(step / max(1e-9, phase.steps), seconds / max(1e-9, 60 * phase.minutes))
            if not phase.steps or not phase.minutes or progress >= 1:
                break
            rate = _schedule(progress, step, s.warm_up)
            for group in optimiser.param_groups:
                group["lr"] = phase.lr * rate * group["factor"]
            optimiser.zero_grad(set_to_none=True)
            seen = team.step(step, rng)
            norm = torch.nn.utils.clip_grad_norm_(parameters, s.clip)
            if torch.isfinite(norm):
                with all_cores():
                    optimiser.step()
            step += 1
            decay = min(s.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                _average(shadow, nets.state_dict(), 1 - decay)
            seen["grad"] = norm.detach()
            names = list(seen)
            history.append(torch.stack([v.float() for v in seen.values()]))
            if step % s.every == 0 or step == phase.steps:
                now = time.monotonic()
                row = {"phase": phase.name, "step": step, "minutes": (before + now - start) / 60}
                row |= _figures(dict(zip(names, torch.stack(history).mean(0).tolist(), strict=True)))
                speed = phase.images * (step - window_step) / (now - window)
                row |= {"lr": phase.lr * rate, "images_per_second": speed}
                history.clear()
                window, window_step = now, step
                log.add(row)
            bar.update(progress, seconds, row | {"step": step})
            due = time.monotonic() - saved > 60 * s.checkpoint_minutes
            if due or (s.checkpoint_steps and step % s.checkpoint_steps == 0):
                measure()
                keep()
                saved = window = time.monotonic()
                window_step = step
            if interrupt.asked:
                keep()
                log.say(f"interrupted after step {step} of {phase.name}; go on with --resume --run {s.folder}")
                raise KeyboardInterrupt
    nets.load_state_dict(shadow)
    measure()
    keep(done=True)


def _schedule(progress: float, step: int, warm_up: int) -> float:
    """Share of the learning rate: rises for some steps, or a tenth of a short phase, then half a cosine to 1 %."""
    begun = max((step + 1) / max(1, warm_up), 10 * progress)
    return max(0.01, 0.5 * (1 + math.cos(math.pi * progress))) * min(1.0, begun)


def _optimiser(s: Settings, phase: Phase, device: str) -> torch.optim.Optimizer:
    if s.optimiser == "soap" and phase.name != "head":  # whose settings were chosen with Adam
        return Soap(phase.groups, phase.lr)
    return torch.optim.AdamW(phase.groups, lr=phase.lr, weight_decay=0.0, fused=device.startswith("cuda"))


def _is_quantised(phase: Phase, work: Work) -> bool:
    """Whether the prior imitates its integer form by now; that of a model file does from the first."""
    if work.s.base:
        return work.estimates_rate
    return phase.name not in (*FLOATING, "integer") and hasattr(work.nets, "prior")


def load_networks(run: str | Path) -> Networks:
    """Averaged networks of a run's folder, in evaluation mode.

    Raises
    ------
    ConfigurationError
        If there is no run, or its tensors do not fit its architecture.
    """
    run = Path(run)
    try:
        about = json.loads((run / "settings.json").read_text())
        arch = architecture_from(about["architecture"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{run}: no run there ({type(error).__name__}: {error})") from None
    state = checkpoint.load(run)
    plain = run / "ema.safetensors"
    if state is None and not plain.exists():
        raise ConfigurationError(f"{run}: has no checkpoint")
    nets = make_networks(arch)
    _load(nets, state.below("ema") if state is not None else load_file(plain), run)
    nets.integer = state is not None and state.phase not in FLOATING and nets.stores_integers
    nets.bounded = bool(about.get("bounded"))
    return nets.eval()


def _base(s: Settings) -> ModelInfo | None:
    """The model of --from; before any image is read, which may take long."""
    if not s.base:
        return None
    info = read_info(s.base) if Path(s.base).is_file() else find_model(s.base)
    if s.trains_encoder and not family_of(info.architecture).exact:
        raise ConfigurationError(
            f"--encoder-minutes: model {info.name!r} has networks in floating point, whose analysis transform cannot "
            "be trained alone; only labels can be adapted, with --labels and without --encoder-minutes"
        )
    return info


def _networks(
    s: Settings, base: ModelInfo | None, photos: Photographs | None, tiles: LabelledTiles | None, fresh: bool
) -> Networks:
    """The networks to begin with."""
    torch.manual_seed(s.seed)
    if base is not None:
        nets = _from_model(base, len(tiles.classes if tiles else base.vocabulary.classes))
        nets.bounded = nets.integer
        return nets
    arch = architecture_of(s, len(tiles.classes) if tiles else 0)
    if not s.start or not fresh:
        nets = make_networks(arch)
        if fresh and nets.stores_integers:
            linear_start(photos, nets.analysis, nets.synthesis, nets.gains, nets.prior, s.klt_crops)
        return nets
    old = _started(s)
    old.bounded |= old.integer  # without bounds, what has learned to live within some runs away on some images
    if old.arch == arch:
        return old
    if arch.family != old.arch.family or not old.stores_integers or photos is None:
        raise ConfigurationError(f"--start {s.start}: has another architecture than {s.architecture!r}")
    nets = make_networks(arch)
    old.integer, nets.bounded = False, old.bounded
    try:
        grow(nets, old, photos, s.klt_crops)
    except ConfigurationError as error:
        raise ConfigurationError(f"--start {s.start}: {error}") from None
    return nets


def _started(s: Settings) -> Networks:
    """The networks of --start: a run's folder, or the name or file of a model."""
    if Path(s.start).is_dir():
        return load_networks(s.start)
    info = read_info(s.start) if Path(s.start).is_file() else find_model(s.start)
    if not family_of(info.architecture).exact:
        raise ConfigurationError(
            f"--start {s.start}: model {info.name!r} has networks in floating point, whose files do not hold the prior "
            "that training goes on with; name the folder of its run"
        )
    return _from_model(info, len(info.vocabulary.classes), "--start").eval()


def _from_model(info: ModelInfo, classes: int, option: str = "--from") -> Networks:
    """Networks with the transforms and, as far as it fits the classes, the head of a model file."""
    arrays = load_arrays(info)
    try:
        nets = make_networks(architecture_from(info.architecture | {"classes": classes + 1}))
        restore(nets, arrays)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{option} {info.path}: tensors do not fit its architecture ({error})") from None
    return nets


def _prior_of(info: ModelInfo) -> dict[str, Tensor]:
    prefix = "decoder.prior."
    return {k[len(prefix) :]: torch.from_numpy(v) for k, v in load_arrays(info).items() if k.startswith(prefix)}


def _load(nets: Networks, tensors: dict[str, Tensor], where: Path) -> None:
    try:
        nets.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigurationError(f"{where}: tensors do not fit the architecture: {error}") from None


def _average(shadow: dict[str, Tensor], current: dict[str, Tensor], weight: float) -> None:
    """Move the averages towards the current values; counters (of batch normalisation) are copied."""
    real = [k for k, v in shadow.items() if v.is_floating_point()]
    torch._foreach_lerp_([shadow[k] for k in real], [current[k] for k in real], weight)
    for k in shadow.keys() - set(real):
        shadow[k].copy_(current[k])


def _figures(means: dict[str, float]) -> dict[str, float]:
    """Columns of the log: mean squared errors as PSNR in dB."""
    out = {}
    for name, value in means.items():
        if name.endswith("mse"):
            name, value = name.replace("mse", "psnr"), 10 * math.log10(255**2 / max(value, 1e-9))
        out[name] = value
    return out


def _device(s: Settings) -> str:
    if s.device != "auto":
        if s.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigurationError(f"device: {s.device} was asked for, and there is no CUDA device")
        return s.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_processes(s: Settings, nets: Networks, device: str) -> None:
    """Refuse to share out what cannot be."""
    if s.processes == 1:
        return
    if device != "cpu" or not hasattr(os, "fork"):
        raise ConfigurationError("processes: they share the steps of a CPU, where processes can be forked")
    if not nets.can_be_shared:
        raise ConfigurationError("processes: the paper's networks normalise by statistics of whole batches")


def _report_data(s: Settings, photos: Photographs | None, tiles: LabelledTiles | None, log: Log) -> None:
    if photos:
        pool = photos.pool
        log.say(
            f"{len(pool.shortest)} images ({pool.nbytes / 1e6:.0f} MB on {pool.flat.device}), "
            f"{len(photos.held_out)} held out"
        )
    if tiles:
        log.say(
            f"{len(tiles.labels)} labelled images of {len(tiles.classes)} classes, "
            f"{len(tiles.test_labels)} held out: {', '.join(tiles.classes)}"
        )
        named = sorted({c for children in s.parents.values() for c in children} - set(tiles.classes))
        if named:
            raise ConfigurationError(f"parents: no class named {', '.join(named)}; classes: {', '.join(tiles.classes)}")
        if not photos:
            log.say("no --images: nothing teaches the head what is unknown")
    elif s.parents:
        raise ConfigurationError("parents: names of labels, but there are no --labels")
    skipped = [name for data in (photos, tiles) if data for name in data.skipped]
    if skipped:
        (s.folder / "skipped.txt").write_text("\n".join(skipped) + "\n")
        log.say(f"skipped {len(skipped)} unreadable images (all in {s.folder / 'skipped.txt'}):")
        for name in skipped[:10]:
            log.say(f"  {name}")


def _check_same(s: Settings, about: dict[str, object]) -> None:
    """Refuse to resume with other networks or classes, or another model that they are from."""
    stored = {"decoder": about["decoder"]} | json.loads((s.folder / "settings.json").read_text())
    for key in ("architecture", "classes", "decoder"):
        if stored.get(key) != about[key]:
            raise ConfigurationError(
                f"{s.folder}: {key} of the checkpoint is {stored.get(key)}, asked for: {about[key]}"
            )
    before = stored["settings"].get("optimiser", "adam")
    if s.optimiser != before:
        raise ConfigurationError(f"{s.folder}: the checkpoint is of a run with --optimiser {before}")
    if s.base and Settings(**stored["settings"]).trains_encoder != s.trains_encoder:
        raise ConfigurationError(f"{s.folder}: with --encoder-minutes or without it, a run goes on as it began")


def _compile(nets: Networks) -> bool:
    """Compile the transforms; whatever fails there runs as it is."""
    try:
        import torch._dynamo

        torch._dynamo.config.suppress_errors = True
        for net in (nets.analysis, nets.synthesis):
            net.compile(dynamic=False)
    except (ImportError, RuntimeError, AttributeError):
        return False
    return True


def _eager() -> AbstractContextManager[object]:
    """Run compiled networks as they are; older versions of torch compile them for every shape."""
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance else nullcontext()


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    """Let torch use as many threads; 0: as it did."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _matmul_precision(device: str) -> Iterator[None]:
    """Let CUDA use TF32 while training only: elsewhere products of integers must be exact."""
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
