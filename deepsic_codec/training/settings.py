"""All choices of a training run, and named presets that override some of them (no torch)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from deepsic_codec.errors import ConfigurationError


@dataclass(frozen=True)
class Settings:
    """Settings of a run; stored as ``settings.json`` in its folder.

    Each phase ends when its minutes or its steps are over, whichever comes first; a phase
    of 0 minutes or 0 steps is left out.
    """

    images: list[str] = field(default_factory=list)  # unlabelled: folders, zip files, Zarr arrays
    labels: list[str] = field(default_factory=list)  # labelled: the same with <Class>/<image>, or CSV of file,label
    label_root: str = ""  # folder or zip file that the names in a CSV are relative to; default: the CSV's folder
    parents: dict[str, list[str]] = field(default_factory=dict)  # broader name -> classes
    out: str = "model.safetensors"  # the model file; its stem is the model's name
    run: str = ""  # folder of checkpoints and log; default: runs/<name>
    start: str = ""  # a run's folder, or a model, whose networks to begin with, instead of the linear start
    base: str = ""  # --from: keep this model's decoder; train its semantic head (--labels), its analysis, or both
    architecture: str = "base"  # a name in deepsic_codec.training.phases.ARCHITECTURES

    klt_crops: int = 2000  # for the linear start

    minutes: float = 80.0  # phase 1: joint training of everything
    steps: int = 1_000_000
    photos_per_step: int = 6  # crops of unlabelled images
    mosaics_per_step: int = 2  # of 4x4 labelled cells, or 16 times as many cells alone
    crop: int = 256  # pixels, a multiple of 64
    quality_low: float = 1.0  # qualities are drawn evenly between these; equal: a model for one rate
    quality_high: float = 100.0
    quality_power: float = 1.0  # above 1: low qualities are drawn more often
    optimiser: str = "soap"  # or adam, which needs more steps for the same
    lr: float = 8e-4  # cosine decay to 1 % after a short warm-up
    linear_lr: float = 0.1  # factor for the KLT shortcuts, whose entries are small and good already
    prior_lr: float = 2.0  # factor for the prior, which follows the transforms
    warm_up: int = 200  # steps; less, in phases that are over before ten times as many
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999
    semantic_weight: float = 0.1  # lambda2
    jitter: float = 0.5  # of labelled cells: contrast, brightness, colour balance, place; 0: none

    integer_minutes: float = 10.0  # phase 2: everything again, imitating the integer form; 0: only brought into it
    integer_steps: int = 1_000_000
    integer_learning_rate: float = 1e-4

    encoder_minutes: float = 0.0  # with --from only: analysis (and head), for the decoder as it is; then phase 2
    encoder_steps: int = 1_000_000
    encoder_learning_rate: float = 2e-4

    synthesis_minutes: float = 0.0  # phase 4: synthesis alone, on symbols as the encoder chooses them
    synthesis_steps: int = 1_000_000
    synthesis_learning_rate: float = 2e-4

    symbol_batches: int = 400  # phase 3: integer prior, on 8 crops each of fixed symbols
    prior_minutes: float = 12.0
    prior_steps: int = 1_000_000
    prior_batch: int = 16
    prior_learning_rate: float = 6e-4

    head_minutes: float = 6.0  # phase 5: semantic head, on latents of fresh crops
    head_steps: int = 1_000_000
    head_batch: int = 128
    head_learning_rate: float = 3e-3
    head_weight_decay: float = 0.1

    table_samples: int = 600  # phase 6: the coder's tables; crops to fit on
    table_checks: int = 120  # and to choose on

    device: str = "auto"  # CUDA if there is one, else the CPU
    data_device: str = "auto"  # where decoded images lie: with the networks if they fit in half of the free memory
    threads: int = 0  # 0: torch's choice
    processes: int = 1  # of one thread each, which share out every step's images; on a CPU only
    bf16: bool = True
    compile: bool = False  # on CUDA only; goes on without where it fails
    graphs: bool = True  # on CUDA: steps of the joint loss as CUDA graphs
    every: int = 250  # steps between log rows
    checkpoint_minutes: float = 4.0
    checkpoint_steps: int = 0  # 0: by minutes only
    seed: int = 0
    plot: bool = False  # draw log.png at every checkpoint

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is read."""
        if self.crop < 64 or self.crop % 64:
            raise ConfigurationError(f"crop: expected a multiple of 64 pixels, got {self.crop}")
        if not 1 <= self.quality_low <= self.quality_high <= 100:
            raise ConfigurationError(
                f"qualities: expected 1 <= low <= high <= 100, got {self.quality_low} and {self.quality_high}"
            )
        if not 0.1 <= self.quality_power <= 10:
            raise ConfigurationError(f"quality_power: expected 0.1 to 10, got {self.quality_power}")
        if self.optimiser not in ("soap", "adam"):
            raise ConfigurationError(f"optimiser: expected soap or adam, got {self.optimiser!r}")
        for name in (
            "photos_per_step",
            "mosaics_per_step",
            "every",
            "prior_batch",
            "head_batch",
            "symbol_batches",
            "table_samples",
            "table_checks",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.processes < 1:
            raise ConfigurationError(f"processes: expected at least 1, got {self.processes}")
        if self.processes > 1 and self.threads > 1:
            raise ConfigurationError("processes: each has one thread; leave out --threads")
        for name in self.shared:
            if getattr(self, name) % self.processes:
                raise ConfigurationError(
                    f"processes: {name} {getattr(self, name)} cannot be shared out to "
                    f"{self.processes}; give a multiple of that"
                )
        if self.base and not self.labels and not self.trains_encoder:
            raise ConfigurationError(
                "--from adapts the semantic head and needs labelled images: add --labels, or "
                "train the analysis transform with --encoder-minutes"
            )
        if self.trains_encoder and not self.base:
            raise ConfigurationError("--encoder-minutes is for --from: a new model gets its encoder in the joint phase")
        if self.trains_encoder and not self.images:
            raise ConfigurationError("--encoder-minutes: nothing to train the analysis transform on; add --images")
        if self.base and self.start:
            raise ConfigurationError("--from and --start exclude each other")
        if not self.base and not self.images:
            raise ConfigurationError("nothing to train on: add --images (folders, zip files or Zarr arrays)")

    @property
    def shared(self) -> list[str]:
        """Settings that say how much a step takes, of what is trained on."""
        names = ["photos_per_step"] * bool(self.images) + ["mosaics_per_step", "head_batch"] * bool(self.labels)
        return names + ([] if self.base else ["prior_batch"])

    @property
    def share(self) -> Settings:
        """What each process takes of a step."""
        return replace(self, processes=1, **{name: getattr(self, name) // self.processes for name in self.shared})

    @property
    def trains_encoder(self) -> bool:
        """Whether the analysis transform of another model is trained, for its decoder."""
        return bool(self.encoder_minutes and self.encoder_steps)

    @property
    def name(self) -> str:
        """Name of the model: that of its file."""
        return Path(self.out).stem

    @property
    def folder(self) -> Path:
        """Where checkpoints and the log go."""
        return Path(self.run or Path("runs") / self.name)

    def public(self) -> dict[str, Any]:
        """The settings without the places of this machine and what had no say, for the model file."""
        hidden = ["out", "run", "start", "device", "data_device", "plot", "label_root", "threads", "processes"]
        unused = [] if self.trains_encoder else ["encoder"]
        if self.base:
            hidden += ["architecture", "klt_crops", "minutes", "steps", "lr", "symbol_batches"]
            unused += ["prior", "synthesis", "table", *([] if self.trains_encoder else ["integer"])]
        places = {"images": [Path(p).name for p in self.images], "labels": [Path(p).name for p in self.labels]}
        values = asdict(self) | places | {"base": Path(self.base).stem}
        return {k: v for k, v in values.items() if k not in hidden and k.split("_")[0] not in unused}


PRESETS: dict[str, dict[str, Any]] = {
    # two CPU cores, about two hours with all phases; result: not run yet as this command
    "cpu-90min": {},
    # one H100, a quarter of an hour; result: the phases joint and integer of the released base, from base-0.5
    "h100-15min": {
        "minutes": 8.2,
        "photos_per_step": 128,
        "mosaics_per_step": 16,
        "quality_power": 1.4,
        "semantic_weight": 0.12,
        "lr": 1.4e-3,
        "warm_up": 100,
        "jitter": 0.35,
        "integer_minutes": 1.1,
        "integer_learning_rate": 2e-4,
        "prior_minutes": 1.0,
        "prior_batch": 64,
        "symbol_batches": 1200,
        "synthesis_minutes": 0.5,
        "synthesis_learning_rate": 1e-4,
        "head_minutes": 1.5,
        "head_batch": 1024,
        "checkpoint_minutes": 2.5,
        "every": 200,
    },
    # the paper's networks, one rate of --architecture paper-0.25, -0.5, -1.0 or -1.5; result: docs/training.md
    "paper": {
        "architecture": "paper-0.5",
        "crop": 128,  # section IV-B: 128x128 patches, batches of 32
        "photos_per_step": 24,
        "mosaics_per_step": 1,
        "lr": 1e-3,
        "head_learning_rate": 1e-3,
        "prior_minutes": 1.0,
    },
    # one CPU core, seconds; shows that everything works, its model is good for nothing
    "tiny": {
        "architecture": "tiny",
        "klt_crops": 100,
        "crop": 64,
        "minutes": 1.0,
        "steps": 20,
        "photos_per_step": 2,
        "mosaics_per_step": 1,
        "integer_steps": 5,
        "symbol_batches": 2,
        "prior_steps": 5,
        "head_steps": 5,
        "table_samples": 4,
        "table_checks": 2,
        "every": 5,
    },
}


def resolve(given: dict[str, Any], preset: str = "", resume: bool = False) -> Settings:
    """Settings from a preset or, to resume, from the run's folder, with what is given on top.

    Raises
    ------
    ConfigurationError
        For an unknown preset or setting, or if there is no run to resume.
    """
    unknown = sorted(set(given) - {f.name for f in fields(Settings)})
    if unknown:
        raise ConfigurationError(f"no setting {', '.join(unknown)}; see deepsic train --help")
    if preset and preset not in PRESETS:
        raise ConfigurationError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    if not resume:
        return Settings(**{**PRESETS.get(preset, {}), **given})
    folder = Path(given.get("run") or Path("runs") / Path(given.get("out", Settings.out)).stem)
    try:
        stored = json.loads((folder / "settings.json").read_text())["settings"]
        settings = Settings(**{"optimiser": "adam"} | stored)  # what there was before there was a choice
    except (OSError, KeyError, TypeError, ValueError) as error:
        message = f"{folder}: no run to resume there ({type(error).__name__}: {error}); name its folder with --run"
        raise ConfigurationError(message) from None
    return replace(settings, **{"run": str(folder), **given})
