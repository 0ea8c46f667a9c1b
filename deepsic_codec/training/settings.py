"""Settings of a training run, and presets: named settings that others override. Needs no torch."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.zoo import ALIASES


def option(default: Any, text: str, *, common: bool = False) -> Any:
    """Return a field of `Settings`: its default, its help text, and whether `deepsic train --help` shows it."""
    metadata = {"help": text, "common": common, "default": default}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Settings of a run, stored as `settings.json` in its folder.

    Each phase ends when its minutes or its steps are over, whichever comes first. A phase of 0 minutes or 0 steps is
    left out. The metadata of each field holds its help text.

    Raises
    ------
    ConfigurationError
        For values that cannot work.
    """

    images: list[str] = option([], "unlabelled images: folders, zip files, image files or Zarr arrays", common=True)
    labels: list[str] = option(
        [], "labelled images: folders or zip files with <Class>/<image> inside, or CSV files of file,label", common=True
    )
    label_root: str = option("", "folder or zip file that names in a CSV are relative to (default: the CSV's folder)")
    parents: dict[str, list[str]] = option({}, 'JSON of broader names, such as {"Water": ["River"]}, or a file of it')
    out: str = option("model.safetensors", "model file; its stem is the model's name", common=True)
    run: str = option("", "folder for checkpoints and log (default: runs/<name>)", common=True)
    start: str = option("", "folder of a run, or name or file of a model, whose networks to begin with")
    base: str = option(
        "", "name or file of a model whose decoder stays: trains its labels, its encoder, or both", common=True
    )
    architecture: str = option("base", "base, tiny, or paper-0.25, paper-0.5, paper-1.0, paper-1.5")

    klt_crops: int = option(2000, "crops that the linear start is computed from")

    minutes: float = option(80.0, "minutes of the phase joint, which trains all networks", common=True)
    steps: int = option(1_000_000, "steps of the phase joint")
    photos_per_step: int = option(6, "crops of unlabelled images in a step")
    mosaics_per_step: int = option(2, "mosaics of 4x4 labelled cells in a step, or 16 times as many single cells")
    crop: int = option(256, "edge of a crop in pixels, a multiple of 64")
    quality_low: float = option(1.0, "lowest quality to train; equal to the highest: a model for one rate")
    quality_high: float = option(100.0, "highest quality to train")
    quality_power: float = option(1.0, "above 1: low qualities are drawn more often")
    used_share: float = option(0.0, "share of the qualities that are drawn evenly from used_low to used_high")
    used_low: float = option(10.0, "lowest of the qualities that are used most")
    used_high: float = option(75.0, "highest of the qualities that are used most")
    lr: float = option(8e-4, "learning rate of joint: cosine decay to 1 % after a short warm-up")
    warm_up: int = option(200, "steps of warm-up, or a tenth of a phase that has fewer than ten times as many")
    semantic_weight: float = option(0.1, "weight of the labels in the loss: the paper's lambda2")
    jitter: float = option(0.5, "variation of light and position of labelled cells; 0: none")

    integer_minutes: float = option(10.0, "minutes of the phase integer, which trains with integer arithmetic")
    integer_steps: int = option(1_000_000, "steps of the phase integer")
    integer_learning_rate: float = option(1e-4, "learning rate of the phase integer")

    encoder_minutes: float = option(0.0, "with --from: minutes of the phase encoder, which trains the analysis")
    encoder_steps: int = option(1_000_000, "steps of the phase encoder")
    encoder_learning_rate: float = option(2e-4, "learning rate of the phase encoder")

    synthesis_minutes: float = option(0.0, "minutes of the phase synthesis, on the symbols that the encoder chooses")
    synthesis_steps: int = option(1_000_000, "steps of the phase synthesis")
    synthesis_learning_rate: float = option(2e-4, "learning rate of the phase synthesis")

    symbol_batches: int = option(400, "batches of 8 crops whose symbols the integer prior is trained on")
    prior_minutes: float = option(12.0, "minutes of the phase prior")
    prior_steps: int = option(1_000_000, "steps of the phase prior")
    prior_batch: int = option(16, "crops in a step of the phase prior")
    prior_learning_rate: float = option(6e-4, "learning rate of the phase prior")

    head_minutes: float = option(6.0, "minutes of the phase head, which trains the semantic head alone")
    head_steps: int = option(1_000_000, "steps of the phase head")
    head_batch: int = option(128, "cells in a step of the phase head")
    head_learning_rate: float = option(3e-3, "learning rate of the phase head")
    head_weight_decay: float = option(0.1, "weight decay of the phase head")

    table_samples: int = option(600, "crops that the coder's tables are fitted to")
    table_checks: int = option(120, "crops that the coder's settings are chosen on")

    device: str = option("auto", "auto, cpu, cuda or cuda:<n>", common=True)
    data_device: str = option("auto", "where decoded images are kept: auto, cpu or cuda")
    threads: int = option(0, "threads of torch; 0: as many as torch chooses")
    processes: int = option(1, "CPU processes of one thread each that share the images of each step")
    bf16: bool = option(True, "compute in bfloat16 where that is precise enough")
    every: int = option(250, "steps between rows of the log")
    checkpoint_minutes: float = option(4.0, "minutes between checkpoints")
    checkpoint_steps: int = option(0, "steps between checkpoints; 0: by minutes only")
    seed: int = option(0, "seed of all random draws")

    def __post_init__(self) -> None:
        """Refuse values that cannot work, before any file is read."""
        self._check_ranges()
        self._check_processes()
        self._check_sources()

    def _check_ranges(self) -> None:
        if self.crop < 64 or self.crop % 64:
            raise ConfigurationError(f"crop: expected a multiple of 64 pixels, got {self.crop}")
        if not 1 <= self.quality_low <= self.quality_high <= 100:
            raise ConfigurationError(
                f"qualities: expected 1 <= low <= high <= 100, got {self.quality_low} and {self.quality_high}"
            )
        if not 0.1 <= self.quality_power <= 10:
            raise ConfigurationError(f"quality_power: expected 0.1 to 10, got {self.quality_power}")
        if not 0 <= self.used_share <= 1 or (self.used_share and not self.used_low <= self.used_high):
            raise ConfigurationError(
                f"used_share: expected 0 to 1 and used_low <= used_high, got {self.used_share}, {self.used_low} and "
                f"{self.used_high}"
            )
        counts = ("photos_per_step", "mosaics_per_step", "every", "prior_batch", "head_batch", "symbol_batches")
        for name in (*counts, "table_samples", "table_checks", "processes"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def _check_processes(self) -> None:
        if self.processes > 1 and self.threads > 1:
            raise ConfigurationError("processes: each process has one thread; leave out --threads")
        for name in self._divided:
            if getattr(self, name) % self.processes:
                raise ConfigurationError(
                    f"processes: {name} {getattr(self, name)} cannot be divided by {self.processes}; give a multiple"
                )

    def _check_sources(self) -> None:
        if self.name in ALIASES:
            raise ConfigurationError(
                f"out: the name {self.name!r} already stands for a packaged model; give the file another one"
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
            raise ConfigurationError("--from and --start exclude each other; give one of them")
        if not self.base and not self.images:
            raise ConfigurationError("nothing to train on: add --images (folders, zip files or Zarr arrays)")

    @property
    def _divided(self) -> list[str]:
        """Settings that count the images of a step, for the available data."""
        names = ["photos_per_step"] * bool(self.images) + ["mosaics_per_step", "head_batch"] * bool(self.labels)
        return names + ([] if self.base else ["prior_batch"])

    def per_process(self) -> Self:
        """Return the settings of one of the processes that share a step."""
        return replace(self, processes=1, **{name: getattr(self, name) // self.processes for name in self._divided})

    @property
    def trains_encoder(self) -> bool:
        """Whether the analysis transform of another model is trained, for its decoder."""
        return bool(self.encoder_minutes and self.encoder_steps)

    @property
    def name(self) -> str:
        """Name of the model: the stem of its file."""
        return Path(self.out).stem

    @property
    def folder(self) -> Path:
        """Folder for checkpoints and the log."""
        return Path(self.run or Path("runs") / self.name)

    def public(self) -> dict[str, Any]:
        """Return the settings for the model file: no paths of this machine, no settings without effect."""
        hidden = ["out", "run", "start", "device", "data_device", "label_root", "threads", "processes"]
        unused = [] if self.trains_encoder else ["encoder"]
        if self.base:
            hidden += ["architecture", "klt_crops", "minutes", "steps", "lr", "symbol_batches"]
            unused += ["prior", "synthesis", "table", *([] if self.trains_encoder else ["integer"])]
        names = {"images": [Path(p).name for p in self.images], "labels": [Path(p).name for p in self.labels]}
        values = asdict(self) | names | {"base": Path(self.base).stem}
        return {k: v for k, v in values.items() if k not in hidden and k.split("_")[0] not in unused}


PRESETS: dict[str, dict[str, Any]] = {
    # two CPU cores, about two hours with all phases
    "cpu-90min": {},
    # one H100, a quarter of an hour
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
    # the paper's networks, one rate: --architecture paper-0.25, -0.5, -1.0 or -1.5
    "paper": {
        "architecture": "paper-0.5",
        "crop": 128,  # section IV-B: 128x128 patches
        "photos_per_step": 8,
        "mosaics_per_step": 1,
        "quality_low": 50.0,  # without effect: measure once
        "quality_high": 50.0,
        "lr": 5e-4,
        "minutes": 15.0,
        "checkpoint_minutes": 8.0,
        "prior_minutes": 0.5,
        "prior_learning_rate": 0.03,
        "head_minutes": 2.5,
    },
    # one CPU core, seconds: shows that every phase runs, its model is of no use
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


def resolve(settings: dict[str, Any], preset: str = "", resume: bool = False) -> Settings:
    """Return settings on top of those of a preset or, to resume, on top of those of the run.

    Parameters
    ----------
    settings : dict
        Fields of `Settings`.
    preset : str
        Name of a preset, or path of a JSON file with fields of `Settings`.
    resume : bool
        Take the settings of the run's folder instead.

    Raises
    ------
    ConfigurationError
        For an unknown preset or setting, or if there is no run to resume.
    """
    _check_names(settings)
    if not resume:
        return Settings(**{**_preset(preset), **settings})
    folder = Path(settings.get("run") or Path("runs") / Path(settings.get("out", Settings.out)).stem)
    try:
        stored = Settings(**json.loads((folder / "settings.json").read_text())["settings"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        message = f"{folder}: no run to resume ({type(error).__name__}: {error}); name its folder with --run"
        raise ConfigurationError(message) from None
    return replace(stored, **{"run": str(folder), **settings})


def _check_names(settings: dict[str, Any]) -> None:
    unknown = sorted(set(settings) - {f.name for f in fields(Settings)})
    if unknown:
        raise ConfigurationError(f"unknown setting {', '.join(unknown)}; see deepsic train --help-all")


def _preset(name: str) -> dict[str, Any]:
    if not name or name in PRESETS:
        return PRESETS.get(name, {})
    try:
        settings = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"preset: expected one of {', '.join(PRESETS)}, or a JSON file of settings, got {name!r} ({error})"
        ) from None
    if not isinstance(settings, dict):
        raise ConfigurationError(f"preset: expected a JSON object of settings in {name}, got {type(settings).__name__}")
    _check_names(settings)
    return settings
