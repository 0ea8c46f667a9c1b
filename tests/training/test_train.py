"""The trainer on tiny networks: phases, exact resume, adapting the head, the model that comes out."""

import csv
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepsic_codec.cli import main
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.file import SEARCH_VARIABLE, load_arrays, read_info
from deepsic_codec.model.runtime import Runtime
from deepsic_codec.samples import eurosat_mosaic
from deepsic_codec.training import checkpoint, phases, train
from deepsic_codec.training.settings import PRESETS, Settings, resolve
from tests.common import check_lazy, check_rejects, psnr


def settings(data, folder, **changes):
    tiny = PRESETS["tiny"] | {"minutes": 10.0, "steps": 8, "integer_steps": 2, "prior_steps": 6, "head_steps": 4,
                              "head_batch": 16, "synthesis_minutes": 9.0, "synthesis_steps": 3, "every": 1}  # fmt: skip
    places = {"images": [data.photos], "labels": [data.tiles], "out": str(folder / "model.safetensors"),
              "run": str(folder / "run")}  # fmt: skip
    return Settings(**(tiny | places | changes))


def losses(folder):
    with open(folder / "run" / "log.csv", newline="") as file:
        return [(r["phase"], int(r["step"]), float(r["loss"])) for r in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupted: its folder and its model."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train.train(settings(data, folder))


def test_all_phases_end_in_a_model_that_codes_images(whole):
    folder, info = whole
    assert [p for p, n, _ in losses(folder) if n == 1] == ["joint", "integer", "prior", "synthesis", "head"]
    assert len(losses(folder)) == 8 + 2 + 6 + 3 + 4
    assert info.vocabulary.names == ("Forest", "Highway", "River", "unknown")
    runtime, tile = Runtime(info), eurosat_mosaic()[None, :96, :130]
    encoded = runtime.encode([tile], [70.0])
    decoded = runtime.decode([encoded[0].features], [(1, 96, 130)], [70.0])[0]
    assert psnr(decoded, tile) > 20 and encoded[0].cells.shape == (1, 2, 3, 4)


@pytest.mark.parametrize("phase,step", [("joint", 5), ("integer", 0), ("synthesis", 1), ("prior", 3), ("head", 2)])
def test_interrupted_and_resumed_is_the_same_run(whole, data, tmp_path, monkeypatch, phase, step):
    s = settings(data, tmp_path)
    make = getattr(phases.Work, phase)

    def interrupted(self):
        made = make(self)

        def step_and_signal(number, rng):
            if number == step:
                os.kill(os.getpid(), signal.SIGINT)
            return made.step(number, rng)

        return replace(made, step=step_and_signal)

    with monkeypatch.context() as patch:
        patch.setattr(phases.Work, phase, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(s)
    assert losses(tmp_path)[-1][:2] == (phase, step + 1), "Ctrl-C ends the step and writes a checkpoint"
    info = train.train(s, resume=True)
    assert [r[:2] for r in losses(tmp_path)] == [r[:2] for r in losses(whole[0])]
    np.testing.assert_allclose([r[2] for r in losses(tmp_path)], [r[2] for r in losses(whole[0])], rtol=1e-5)
    assert (info.decoder, info.head) == (whole[1].decoder, whole[1].head)


def test_rows_and_steps_after_the_checkpoint_are_done_again(whole, data, tmp_path, monkeypatch):
    s = settings(data, tmp_path, checkpoint_steps=4)

    def crash(self, number, rng):
        if number == 6:
            raise RuntimeError("power cut")
        return original(self, number, rng)

    original = phases.Work._joint_step
    with monkeypatch.context() as patch:
        patch.setattr(phases.Work, "_joint_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(s)
    assert checkpoint.load(tmp_path / "run").step == 4
    train.train(s, resume=True)
    np.testing.assert_allclose([r[2] for r in losses(tmp_path)], [r[2] for r in losses(whole[0])], rtol=1e-5)


def test_adapted_head_leaves_payloads_readable(whole, data, tmp_path, capsys):
    folder, base = whole
    out = tmp_path / "mine.safetensors"
    command = ["train", "--from", base.path, "--labels", data.tiles, "--images", data.photos, "--out", str(out),
               "--run", str(tmp_path / "run"), "--head-steps", "5", "--head-batch", "16", "--crop", "64",
               "--cell-copies", "1", "--parents", '{"Green": ["Forest"]}']  # fmt: skip
    assert main(command) == 0
    mine = read_info(out)
    assert mine.decoder == base.decoder and mine.head != base.head
    assert mine.vocabulary.parents == {"Green": ("Forest",)} and mine.name == "mine"
    before, after = load_arrays(base), load_arrays(mine)
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    assert changed and all(k.startswith("head.") for k in changed)
    tile = eurosat_mosaic()[None, :64, :64]
    payload = Runtime(base).encode([tile], [50.0])[0].features
    assert Runtime(mine).decode([payload], [(1, 64, 64)], [50.0])[0].shape == tile.shape
    assert "held out" in capsys.readouterr().out


def test_head_of_other_classes(whole, data, tmp_path, monkeypatch):
    """A base is found by name, and a new vocabulary may have another size."""
    import zipfile

    from PIL import Image

    monkeypatch.setenv(SEARCH_VARIABLE, whole[1].path)
    for i, name in enumerate(("Land", "Land", "Sea", "Sea")):
        (tmp_path / "mine" / name).mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(data.tiles) as archive, archive.open(f"train/River/{i}.png") as file:
            Image.open(file).save(tmp_path / "mine" / name / f"{i}.png")
    s = Settings(base="model", labels=[str(tmp_path / "mine")], out=str(tmp_path / "two.safetensors"),
                 run=str(tmp_path / "run"), head_steps=2, head_batch=4, crop=64)  # fmt: skip
    info = train.train(s)
    assert info.vocabulary.names == ("Land", "Sea", "unknown") and info.decoder == whole[1].decoder


def test_start_takes_another_runs_networks_or_says_why_not(whole, data, tmp_path):
    folder, _ = whole
    s = settings(data, tmp_path, start=str(folder / "run"), steps=0, integer_steps=0, synthesis_steps=0, prior_steps=0,
                 head_steps=1)  # fmt: skip
    train.train(s)
    one, two = (checkpoint.load(f / "run").below("net") for f in (folder, tmp_path))
    assert torch.equal(one["analysis.stem.weight"], two["analysis.stem.weight"])
    s = settings(data, tmp_path / "other", start=str(folder / "run"), architecture="base")
    check_rejects(ConfigurationError, "does not fit architecture 'base'|latents 16 instead of 192", train.train, s)


def test_resume_and_fresh_start_are_not_mixed_up(whole, data, tmp_path):
    folder, _ = whole
    check_rejects(ConfigurationError, "has a checkpoint|--resume", train.train, settings(data, folder))
    check_rejects(ConfigurationError, "no run to resume", resolve, {"run": str(tmp_path)}, resume=True)
    assert resolve({"run": str(folder / "run"), "steps": 9}, resume=True).steps == 9
    s = settings(data, folder, labels=[])
    check_rejects(ConfigurationError, "of the checkpoint is|asked for", train.train, s, resume=True)


def test_out_of_memory_says_which_setting_to_lower(data, tmp_path, monkeypatch):
    def full(self, number, rng):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(phases.Work, "_joint_step", full)
    words = "lower --photos-per-step (now 2)|--mosaics-per-step|--crop (now 64)|--data-device cpu"
    check_rejects(ConfigurationError, words, train.train, settings(data, tmp_path))


def test_settings_that_cannot_work():
    for changes, words in [
        ({"crop": 100}, "crop: expected a multiple of 64"),
        ({"quality_low": 60, "quality_high": 50}, "1 <= low <= high <= 100"),
        ({"every": 0}, "every: expected at least 1"),
        ({"images": []}, "nothing to train on"),
        ({"base": "base"}, "needs labelled images"),
        ({"base": "base", "labels": ["x"], "start": "y"}, "exclude each other"),
    ]:
        check_rejects(ConfigurationError, words, Settings, **({"images": ["x"]} | changes))
    check_rejects(ConfigurationError, "no setting speed", resolve, {"speed": 1})
    check_rejects(ConfigurationError, "preset: expected one of", resolve, {}, "fast")
    for name in PRESETS:
        resolve({"images": ["x"]}, name)


def test_settings_in_a_model_name_no_place_of_this_machine(whole):
    from safetensors import safe_open

    with safe_open(whole[1].path, "np") as file:
        about = file.metadata()["deepsic"]
    assert "tiles.zip" in about and "/" not in about.replace("/>", "")


def test_checkpoint_files_stay_below_their_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD", 1000)
    tensors = {f"net.{i}": torch.full((100,), float(i)) for i in range(9)}
    for step in (1, 2):
        checkpoint.save(tmp_path, checkpoint.State("joint", step, 1.5, tensors, {"a": 2**100}))
    files = sorted((tmp_path / "checkpoint").glob("*.safetensors"))
    assert len(files) == 5 and all(f.stat().st_size < 1300 for f in files)
    found = checkpoint.load(tmp_path)
    assert found.step == 2 and found.data_rng == {"a": 2**100} and set(found.tensors) == set(tensors)
    # a crash between the two renames leaves the older one
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert checkpoint.load(tmp_path).step == 2
    (tmp_path / "checkpoint.old" / "3.safetensors").write_bytes(b"x" * 20)
    check_rejects(ConfigurationError, "damaged checkpoint", checkpoint.load, tmp_path)


def test_needs_little_where_it_only_trains():
    """A lent GPU machine has torch, numba, safetensors and rich, and nothing of Zarr."""
    check_lazy("import deepsic_codec.training.train", unwanted=("zarr", "numcodecs", "google_crc32c", "dask", "xarray"))
    check_lazy("from deepsic_codec.training.cli import resolve", unwanted=("torch", "zarr"))
