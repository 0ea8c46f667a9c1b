import csv
import os
import signal
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from deepsic_codec.samples import drone_frame, eurosat_classes, eurosat_mosaic
from deepsic_codec.training import phases, train
from deepsic_codec.training.settings import PRESETS, Settings

CLASSES = ("Forest", "Highway", "River")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of twelve photographs and a zip file of 24 labelled tiles of three classes, from the bundled images."""
    folder = tmp_path_factory.mktemp("images")
    photos = folder / "photos"
    photos.mkdir()
    frame = drone_frame()
    for i in range(12):
        Image.fromarray(frame[(i // 4) * 200 :, (i % 4) * 300 :][:160, : 160 + i]).save(photos / f"{i:02d}.png")
    mosaic, names = eurosat_mosaic(), eurosat_classes()
    tiles = folder / "tiles.zip"
    counts = dict.fromkeys(CLASSES, 0)
    with zipfile.ZipFile(tiles, "w") as archive:
        for r, row in enumerate(names):
            for c, name in enumerate(row):
                if counts.get(name, 8) < 8:
                    path = folder / "tile.png"
                    Image.fromarray(mosaic[64 * r : 64 * r + 64, 64 * c : 64 * c + 64]).save(path)
                    archive.write(path, f"train/{name}/{counts[name]}.png")
                    counts[name] += 1
    assert set(counts.values()) == {8}
    return SimpleNamespace(photos=str(photos), tiles=str(tiles), classes=CLASSES)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """An uninterrupted run of all phases: its folder and its model."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train.train(settings(data, folder))


#: Changes of settings that leave only the phase `joint`, and bring the networks into their integer form.
JOINT_ONLY = {"integer_steps": 0, "synthesis_steps": 0, "prior_steps": 0, "head_steps": 0}


def settings(data, folder, **changes):
    """Settings of a run of all phases, in seconds."""
    tiny = PRESETS["tiny"] | {
        "minutes": 10.0,
        "steps": 8,
        "integer_steps": 2,
        "prior_steps": 6,
        "head_steps": 4,
        "head_batch": 16,
        "synthesis_minutes": 9.0,
        "synthesis_steps": 3,
        "every": 1,
    }
    paths = {
        "images": [data.photos],
        "labels": [data.tiles],
        "out": str(folder / "model.safetensors"),
        "run": str(folder / "run"),
    }
    return Settings(**(tiny | paths | changes))


def adapting(data, folder, base, **changes):
    """Settings of a run that trains the analysis of a model, and with labels its head."""
    paths = {
        "base": base.path,
        "images": [data.photos],
        "out": str(folder / "mine.safetensors"),
        "run": str(folder / "run"),
    }
    tiny = {
        "crop": 64,
        "photos_per_step": 2,
        "mosaics_per_step": 1,
        "encoder_minutes": 9.0,
        "encoder_steps": 5,
        "integer_steps": 2,
        "head_steps": 3,
        "head_batch": 16,
        "every": 1,
        "warm_up": 1,
        "encoder_learning_rate": 3e-3,
    }
    return Settings(**(paths | tiny | changes))


def head_only(data, folder, base, **changes):
    """Settings of a run that trains only the head of a model."""
    tiny = {"labels": [data.tiles], "head_steps": 1, "head_batch": 4, "crop": 64}
    paths = {"base": base, "out": str(folder / "mine.safetensors"), "run": str(folder / "run")}
    return Settings(**(paths | tiny | changes))


def losses(folder):
    """Phase, step and loss of each row of a run's log."""
    with open(folder / "run" / "log.csv", newline="") as file:
        return [(row["phase"], int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def check_same_losses(folder, other, count=None):
    """Equal but for float noise; where symbols are chosen by rounded integers, noise may change the choice."""
    rows, expected = losses(folder), losses(other)[:count]
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    for (phase, _, loss), (_, _, other_loss) in zip(rows, expected, strict=True):
        exact = phase in ("joint", "integer", "encoder")
        assert loss == pytest.approx(other_loss, rel=1e-5 if exact else 2e-4), phase


def train_interrupted(s, monkeypatch, phase, step, resume=False):
    """Train until Ctrl-C during a step of a phase."""

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_step(patch, phase, step, interrupt)
        train.train(s, resume)
    assert losses(s.folder.parent)[-1][:2] == (phase, step + 1), "Ctrl-C ends the step and writes a checkpoint"


def before_step(monkeypatch, phase, step, function):
    """Call a function before a step of a phase."""
    make = phases.PHASES[phase]

    def changed(run):
        made = make(run)

        def changed_step(number, rng):
            if number == step:
                function()
            return made.step(number, rng)

        return replace(made, step=changed_step)

    monkeypatch.setitem(phases.PHASES, phase, changed)
