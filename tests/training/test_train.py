"""The trainer on tiny networks: phases, exact resume, adapting a model, the model file."""

import csv
import json
import os
import re
import zipfile
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from deepsic_codec import DeepSIC, config, create_array
from deepsic_codec.cli.main import main
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.cpu.scheduler import CpuScheduler
from deepsic_codec.model.exact import fixed, formats
from deepsic_codec.model.exact.checks import check_sums
from deepsic_codec.model.exact.export import export_prior, restore_prior
from deepsic_codec.model.file import load_arrays, read_info, save_model
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import eurosat_mosaic
from deepsic_codec.training import balance as balance_module
from deepsic_codec.training import checkpoint, phases, train
from deepsic_codec.training.balance import balance, balance_head
from deepsic_codec.training.data import LabelledTiles, Photographs
from deepsic_codec.training.graphs import Graphs
from deepsic_codec.training.measure import QUALITIES
from deepsic_codec.training.run import ARCHITECTURES, TINY, Run, architecture_of, make_networks
from deepsic_codec.training.settings import PRESETS, Settings, resolve
from deepsic_codec.training.start import networks_of, prior_of
from tests.common import check_lazy, check_rejects, psnr
from tests.training.conftest import (
    JOINT_ONLY,
    adapting,
    before_step,
    check_same_losses,
    head_only,
    losses,
    settings,
    train_interrupted,
)


def test_all_phases_end_in_a_model_that_codes_images(trained):
    folder, info = trained
    assert [phase for phase, step, _ in losses(folder) if step == 1] == [
        "joint",
        "integer",
        "prior",
        "synthesis",
        "head",
    ]
    assert len(losses(folder)) == 8 + 2 + 6 + 3 + 4
    assert info.vocabulary.names == ("Forest", "Highway", "River", "unknown")
    scheduler, tile = CpuScheduler(info), eurosat_mosaic()[None, :96, :130]
    (encoded,) = scheduler.encode([tile], [70.0])
    (decoded,) = scheduler.decode([encoded.features], [(1, 96, 130)], [encoded.quantiser])
    assert psnr(decoded, tile) > 20 and encoded.cells.shape == (1, 2, 3, 4)


def test_run_interrupted_in_every_phase_gives_the_same_model(trained, data, tmp_path, monkeypatch):
    s = settings(data, tmp_path)
    steps = (("joint", 5), ("integer", 0), ("prior", 3), ("synthesis", 1), ("head", 2))
    for phase, step in steps:
        train_interrupted(s, monkeypatch, phase, step, resume=phase != "joint")
    info = train.train(s, resume=True)
    check_same_losses(tmp_path, trained[0])
    assert (info.decoder, info.head) == (trained[1].decoder, trained[1].head)


def test_steps_after_the_checkpoint_are_repeated_after_a_crash(trained, data, tmp_path, monkeypatch):
    def crash():
        raise RuntimeError("power cut")

    s = settings(data, tmp_path, checkpoint_steps=4, **JOINT_ONLY)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        before_step(patch, "joint", 6, crash)
        train.train(s)
    assert checkpoint.load(tmp_path / "run").step == 4
    train.train(s, resume=True)
    check_same_losses(tmp_path, trained[0], count=8)


def test_adapted_head_leaves_payloads_readable(trained, data, tmp_path, monkeypatch, capsys):
    base, out, bounded = trained[1], tmp_path / "mine.safetensors", []
    make = phases.PHASES["head"]
    monkeypatch.setitem(phases.PHASES, "head", lambda run: bounded.append(run.nets.head.bounded) or make(run))
    command = f"train --from {base.path} --labels {data.tiles} --images {data.photos} --out {out} --crop 64"
    command += f" --run {tmp_path / 'run'} --head-steps 5 --head-batch 16"
    assert main([*command.split(), "--parents", '{"Green": ["Forest"]}']) == 0
    assert bounded == [True], "the head is trained within the bounds of its integer form"
    mine = read_info(out)
    assert mine.decoder == base.decoder and mine.head != base.head
    assert mine.vocabulary.parents == {"Green": ("Forest",)} and mine.name == "mine"
    before, after = load_arrays(base), load_arrays(mine)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all(name.startswith("head.") for name in changed)
    tile = eurosat_mosaic()[None, :64, :64]
    (encoded,) = CpuScheduler(base).encode([tile], [50.0])
    (decoded,) = CpuScheduler(mine).decode([encoded.features], [(1, 64, 64)], [encoded.quantiser])
    assert decoded.shape == tile.shape
    assert "held out" in capsys.readouterr().out
    # without --parents, the broader names of the base model stay
    (tmp_path / "next").mkdir()
    after = train.train(head_only(data, tmp_path / "next", str(out)))
    assert (after.vocabulary.classes, after.vocabulary.parents) == (mine.vocabulary.classes, mine.vocabulary.parents)


def test_training_begins_with_the_scores_of_a_model_with_embeddings():
    info = find_model("base")
    nets = networks_of(info, len(info.vocabulary.classes)).eval()
    nets.head.integer = True
    tiles = [np.ascontiguousarray(eurosat_mosaic()[None, y : y + 64, :64]) for y in range(0, 512, 64)]
    quality = torch.full((len(tiles),), 50.0)
    pixels = torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        scores = torch.sigmoid(nets.head(nets.analysis(pixels, quality), quality)) * 255
    encoded = CpuScheduler(info).encode(tiles, [50.0] * len(tiles), features=False)
    stored = np.concatenate([one.cells.reshape(1, -1) for one in encoded])[:, : scores.shape[1]]
    assert info.values > 0 and np.abs(scores.numpy() - stored).max() < 64, "but for the last bits of latents"


def test_head_of_other_classes(trained, data, tmp_path):
    """The base model is named, and the new vocabulary has another number of classes."""
    config.set(model_path=trained[1].path)
    for i, name in enumerate(("Land", "Land", "Sea", "Sea")):
        (tmp_path / "tiles" / name).mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(data.tiles) as archive, archive.open(f"train/River/{i}.png") as file:
            Image.open(file).save(tmp_path / "tiles" / name / f"{i}.png")
    info = train.train(head_only(data, tmp_path, "model", labels=[str(tmp_path / "tiles")]))
    assert info.vocabulary.names == ("Land", "Sea", "unknown") and info.decoder == trained[1].decoder


@pytest.fixture(scope="module")
def encoders(trained, data, tmp_path_factory):
    """Models with another analysis than the base model, without labels and with them: folders and models."""
    models = {}
    for labels in ([], [data.tiles]):
        folder = tmp_path_factory.mktemp("encoder")
        models[bool(labels)] = folder, train.train(adapting(data, folder, trained[1], labels=labels))
    return models


@pytest.mark.parametrize("labelled", [False, True])
def test_another_analysis_for_the_same_decoder(trained, encoders, labelled):
    (_, base), (folder, mine) = trained, encoders[labelled]
    expected = ["encoder", "integer", "head"][: 3 if labelled else 2]
    assert [phase for phase, step, _ in losses(folder) if step == 1] == expected
    assert mine.decoder == base.decoder and mine.encoder != base.encoder and (mine.head == base.head) != labelled
    assert mine.vocabulary.names == base.vocabulary.names
    before, after = load_arrays(base), load_arrays(mine)
    assert before.keys() == after.keys()
    changed = {".".join(k.split(".")[:2]) for k in before if not np.array_equal(before[k], after[k])}
    assert {k for k in changed if not k.startswith("head.")} == {"encoder.analysis"}
    assert any(k.startswith("head.") for k in changed) == labelled
    tile = eurosat_mosaic()[None, :80, :112]
    old, new = CpuScheduler(base), CpuScheduler(mine)
    (encoded,) = new.encode([tile], [60.0])
    assert encoded.features != old.encode([tile], [60.0])[0].features
    arguments = [encoded.features], [(1, 80, 112)], [encoded.quantiser]
    pixels = [scheduler.decode(*arguments)[0] for scheduler in (old, new)]
    np.testing.assert_array_equal(*pixels)
    assert psnr(pixels[0], tile) > 20


@pytest.mark.parametrize("order", [1, -1])
def test_name_decides_which_analysis_encodes(trained, encoders, order):
    """Both files have the same decoder and head, so arrays and payloads name the same identities."""
    models = [trained[1], encoders[False][1]]
    config.set(model_path=[model.path for model in models][::order])
    assert find_model(models[0].decoder) == models[::order][0]
    tile = eurosat_mosaic()[:64, :64]
    payloads = []
    for info in models:
        codec = DeepSIC(model=info.name, quality=60, transform="features").resolved()
        assert (codec.decoder, codec.head) == (models[0].decoder, models[0].head)
        payloads.append(codec.encode(tile))
        assert CpuScheduler(info).encode([tile[None]], [60.0])[0].features in payloads[-1]
        stored = create_array({}, name="a", data=tile, codec=codec)
        np.testing.assert_array_equal(stored[...], codec.decode(payloads[-1]))
    assert payloads[0] != payloads[1]
    assert get_scheduler(models[0]) is not get_scheduler(models[1])
    np.testing.assert_array_equal(*(DeepSIC(model=model.name).decode(payloads[1]) for model in models))


def test_rate_is_measured_with_the_prior_of_the_base_model(encoders):
    for folder, _ in encoders.values():
        with open(folder / "run" / "held_out.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["phase"] for row in rows} >= {"encoder", "integer"} and rows[0]["step"] == "0"
        assert all(0.05 < float(row["bpp"]) < 12 and 10 < float(row["psnr"]) < 60 for row in rows)


def test_analysis_interrupted_in_every_phase_is_the_same(trained, encoders, data, tmp_path, monkeypatch):
    folder, mine = encoders[True]
    s = adapting(data, tmp_path, trained[1], labels=[data.tiles])
    for phase, step in (("encoder", 2), ("integer", 0), ("head", 1)):
        train_interrupted(s, monkeypatch, phase, step, resume=phase != "encoder")
    info = train.train(s, resume=True)
    np.testing.assert_allclose([r[2] for r in losses(tmp_path)], [r[2] for r in losses(folder)], rtol=1e-5)
    assert (info.encoder, info.head, info.decoder) == (mine.encoder, mine.head, mine.decoder)


def test_analysis_is_resumed_with_the_same_phases_and_decoder(trained, encoders, data, tmp_path):
    folder, _ = encoders[True]
    _, base = trained
    s = adapting(data, folder, base, labels=[data.tiles], encoder_steps=0)
    check_rejects(ConfigurationError, "--encoder-minutes|as it began", train.train, s, resume=True)
    arrays = load_arrays(base)
    arrays["decoder.gains.step"] = arrays["decoder.gains.step"] + 1
    other = save_model(tmp_path / "o.safetensors", "o", arrays, base.architecture, base.vocabulary, {})
    s = adapting(data, folder, other, labels=[data.tiles])
    check_rejects(ConfigurationError, f"decoder of the checkpoint is {base.decoder}", train.train, s, resume=True)


def test_model_without_labels_is_adapted_without_and_with_labels(data, tmp_path):
    base = train.train(settings(data, tmp_path, labels=[], **JOINT_ONLY | {"steps": 2, "prior_steps": 1}))
    assert base.vocabulary.names == ("unknown",)
    (tmp_path / "a").mkdir()
    mine = train.train(adapting(data, tmp_path / "a", base, encoder_steps=1, integer_minutes=0.0))
    assert (mine.decoder, mine.head) == (base.decoder, base.head) and mine.encoder != base.encoder
    (tmp_path / "b").mkdir()
    mine = train.train(adapting(data, tmp_path / "b", base, labels=[data.tiles], encoder_steps=1, integer_steps=0))
    assert mine.decoder == base.decoder and mine.vocabulary.classes == data.classes


def test_analysis_of_float_networks_is_not_trained(data, tmp_path):
    path, arrays = tmp_path / "paper.safetensors", {"decoder.a": np.ones(3, np.float16)}
    info = save_model(path, "paper", arrays, ARCHITECTURES["paper-0.5"].to_json(), Vocabulary((), {}), {})
    s = adapting(data, tmp_path, info, images=["missing"])
    check_rejects(ConfigurationError, "'paper' has networks in floating point|--labels", train.train, s)
    assert not s.folder.exists()


def some_images(nets):
    """An image, and a function that runs the analysis on it."""
    x = torch.from_numpy(eurosat_mosaic()[:128, :192].copy()).permute(2, 0, 1)[None].float()
    return x, lambda: nets.analysis(x, torch.tensor([50.0]))


def test_balance_enlarges_only_if_factors_above_one_are_allowed():
    nets = make_networks(TINY).eval().requires_grad_(False)
    _, run = some_images(nets)
    stem = nets.analysis.stem
    stem.weight.mul_(0.01)
    stem.weight[0] *= 1e5
    before = stem.weight.clone()
    balance([nets.analysis], run, max_factor=1.0)
    assert (stem.weight[0].abs() < before[0].abs()).any() and torch.equal(stem.weight[1:], before[1:])
    balance([nets.analysis], run)
    assert (stem.weight[1:].abs() > before[1:].abs()).any(1).all()


@torch.no_grad()
@pytest.mark.parametrize("max_factor", [1.0, 64.0])
def test_balance_keeps_clipped_channels(max_factor):
    torch.manual_seed(0)
    nets = make_networks(TINY).eval().requires_grad_(False)
    nets.analysis.out.weight.normal_(0, 0.1)
    x, run = some_images(nets)
    outs = []
    for bounded in (False, True):
        nets.bounded = bounded
        if bounded:
            for block in nets.analysis.blocks8:
                block.up.weight.mul_(30)
        before = run()
        balance([nets.analysis], run, max_factor)
        outs.append((before, run()))
    torch.testing.assert_close(*outs[0], rtol=1e-3, atol=1e-3)
    if max_factor == 1:
        torch.testing.assert_close(*outs[1], rtol=1e-3, atol=1e-3)
        nets.bounded = False
        assert (run() - outs[1][0]).abs().max() > 0.1, "otherwise nothing was clipped"


@torch.no_grad()
def test_scores_stay_after_a_confident_head_is_rounded():
    """Large logits are clipped, because scaling them down would bring every score towards the middle."""
    torch.manual_seed(0)
    nets = make_networks(TINY).eval()
    nets.head.out.weight.mul_(400)
    cells, quality = torch.randn(64, TINY.latents, 4, 4), torch.full((64,), 50.0)
    before = torch.sigmoid(nets.head(cells, quality))
    assert nets.head(cells, quality).abs().amax() > 30
    balance_head(nets.head, lambda: nets.head(cells, quality))
    nets.head.integer = True
    after = torch.sigmoid(nets.head(cells, quality))
    confident = (before < 0.001) | (before > 0.999)
    assert confident.float().mean() > 0.3 and ((after - before).abs()[confident] < 0.02).float().mean() > 0.9


def test_quality_power_draws_low_qualities_more_often(data, tmp_path):
    mean = []
    for power in (1.0, 2.0):
        torch.manual_seed(0)
        s = settings(data, tmp_path, quality_low=10.0, quality_high=90.0, quality_power=power)
        drawn = Run(s, make_networks(TINY), None, None, "cpu").qualities(4000)
        assert drawn.min() >= 10 and drawn.max() <= 90
        mean.append(float(drawn.mean()))
    assert mean == pytest.approx([50, 10 + 80 / 3], abs=2)


@pytest.mark.parametrize("form", [formats.SPATIAL, formats.UP, formats.DOWN, formats.STEM])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-3, 0.1, 1.0])
def test_any_weights_and_biases_are_stored_in_the_range_of_exact_sums(form, size):
    rng = torch.Generator().manual_seed(1)
    shape = (40, 1, 3, 3) if form.spatial else (40, 24, 1, 1)
    weight = torch.randn(shape, generator=rng) * size
    bias = torch.linspace(-3.9, 3.9, 40)
    stored = fixed.export_layer(weight, bias, form)
    check_sums("layer", stored["weight"], stored["bias"], stored["shift"], form)
    shift = stored["shift"].double()
    bias_stored = (stored["bias"] - torch.floor(torch.exp2(shift - 1))) * torch.exp2(-shift - form.out_bits)
    assert float((bias_stored - bias).abs().max()) < 2.0**-form.out_bits, "a bias is not cut off"


@pytest.mark.parametrize("released", [False, True])
def test_restored_prior_exports_the_stored_tensors(trained, released):
    base = find_model("base") if released else trained[1]
    nets = networks_of(base, len(base.vocabulary.classes))
    (stored, _), exported = prior_of(base), export_prior(nets.prior)
    assert stored.keys() == exported.keys() and stored["1.first"].any() and stored["1.second"].any()
    # a row just below a bound may be exported with twice its integers and a shift of one more, which is the same row
    finer = {k: exported[k].long() - shift.long() for k, shift in stored.items() if k.endswith("_shift")}
    assert all(((extra == 0) | (extra == 1)).all() for extra in finer.values())
    for name, tensor in stored.items():
        layer = name.removesuffix("_bias")
        unit = torch.exp2(finer.get(f"{layer}_shift", torch.zeros(1)).float())
        unit = unit[:, None] if name == layer else unit
        if name not in finer:
            limit = 1 if name.endswith("_bias") else 0
            assert float((tensor - exported[name] / unit).abs().max()) <= limit, name
    with pytest.raises(KeyError):
        restore_prior(nets.prior, {k: v for k, v in stored.items() if k != "1.second_shift"})


def test_start_takes_the_networks_of_another_run(trained, data, tmp_path):
    start = str(trained[0] / "run")
    train.train(settings(data, tmp_path, start=start, **JOINT_ONLY | {"steps": 0}))
    one, two = (checkpoint.load(folder / "run").below("net") for folder in (trained[0], tmp_path))
    assert torch.equal(one["analysis.stem.weight"], two["analysis.stem.weight"])
    s = settings(data, tmp_path / "other", start=start, architecture="base")
    words = "cannot start from these networks|analysis_widths [128, 256], not [8, 16]"
    check_rejects(ConfigurationError, words, train.train, s)


def test_resume_needs_the_run_and_a_fresh_start_refuses_it(trained, data, tmp_path):
    folder, _ = trained
    check_rejects(ConfigurationError, "has a checkpoint|--resume", train.train, settings(data, folder))
    check_rejects(ConfigurationError, "no run to resume", resolve, {"run": str(tmp_path)}, resume=True)
    assert resolve({"run": str(folder / "run"), "steps": 9}, resume=True).steps == 9
    s = settings(data, folder, labels=[])
    check_rejects(ConfigurationError, "of the checkpoint is|the settings have", train.train, s, resume=True)


def test_short_phases_do_not_end_while_they_warm_up():
    rates = {n: [train.schedule(i / n, i, 200) for i in range(n)] for n in (50, 10000)}
    for n, values in rates.items():
        assert values.index(max(values)) <= n // 10 and max(values) > 0.95
        assert values[0] == pytest.approx(1 / 200) and 0.01 <= values[-1] < 0.02
    assert rates[10000][100] == pytest.approx(0.5, abs=0.01)


def joint_run(data, folder, device="cpu"):
    """Tiny networks in their joint phase, without noise; their parameters, and the inputs of a step."""
    s = settings(data, folder, crop=256, bf16=False)
    tiles = LabelledTiles(s.labels, device=device)
    torch.manual_seed(0)
    nets = make_networks(architecture_of(s, len(tiles.classes))).to(device)
    run = Run(s, nets, None, tiles, device)
    parameters = [p for group in phases.joint(run).groups for p in group["params"]]
    nets.eval()
    photos = torch.rand(4, 3, 256, 256, device=device) * 255
    drawn = tiles.mosaics(2, 4, np.random.default_rng(0))
    return run, parameters, [photos, run.qualities(4), *drawn, run.qualities(2)]


def take_gradients(parameters):
    """Return the gradients, and clear them."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return gradients


def test_one_batch_of_photographs_and_tiles_has_the_loss_of_two(data, tmp_path):
    run, parameters, (photos, q, tiles, labels, tiles_q) = joint_run(data, tmp_path)
    together = phases.joint_gradients(run, photos, q, tiles, labels, tiles_q)
    gradients = take_gradients(parameters)
    first = phases.backward(run, [(run.nets.terms(photos, q, False), q, None)])
    second = phases.backward(run, [(run.nets.terms(tiles, tiles_q, False), tiles_q, labels)])
    torch.testing.assert_close(together["loss"], first["loss"] + second["loss"])
    for one, other in zip(gradients, take_gradients(parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert together.keys() == first.keys() | second.keys() and any(g.any() for g in gradients)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_step_equals_the_step(data, tmp_path):
    run, parameters, drawn = joint_run(data, tmp_path, "cuda")
    graphs = Graphs(partial(phases.joint_gradients, run), parameters)
    for factor in (1.0, 0.5):
        drawn[0] = drawn[0] * factor
        expected = phases.joint_gradients(run, *drawn)
        gradients = take_gradients(parameters)
        measures = graphs(*drawn)
        for name, value in expected.items():
            torch.testing.assert_close(measures[name], value, rtol=1e-3, atol=1e-4)
        for one, other in zip(gradients, take_gradients(parameters), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_out_of_memory_names_the_settings_to_lower(data, tmp_path, monkeypatch):
    def fail(*drawn):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(phases, "joint_gradients", fail)
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
        ({"encoder_minutes": 1.0}, "--encoder-minutes is for --from"),
        ({"base": "base", "labels": ["x"], "images": [], "encoder_minutes": 1.0}, "add --images"),
        ({"base": "base", "encoder_minutes": 1.0, "encoder_steps": 0}, "--labels|--encoder-minutes"),
        ({"out": "models/base.safetensors"}, "'base' already stands for a packaged model"),
    ]:
        check_rejects(ConfigurationError, words, Settings, **({"images": ["x"]} | changes))
    check_rejects(ConfigurationError, "unknown setting speed", resolve, {"speed": 1})
    check_rejects(ConfigurationError, "preset: expected one of", resolve, {}, "fast")
    for name in PRESETS:
        resolve({"images": ["x"]}, name)


def test_settings_in_a_model_contain_no_paths(trained):
    from safetensors import safe_open

    with safe_open(trained[1].path, "np") as file:
        about = file.metadata()["deepsic"]
    assert "tiles.zip" in about and "/" not in about.replace("/>", "")


def test_settings_in_a_model_are_those_with_effect(data, tmp_path):
    public = settings(data, tmp_path).public()
    assert {"minutes", "architecture", "prior_steps"} <= public.keys() and "encoder_steps" not in public
    s = Settings(base="/x/base.safetensors", labels=["/y/t.zip"])
    assert s.public()["base"] == "base" and s.public()["labels"] == ["t.zip"]
    assert {"minutes", "architecture", "prior_steps", "integer_minutes", "encoder_minutes"}.isdisjoint(s.public())
    s = replace(s, images=["p"], encoder_minutes=5.0)
    assert s.public()["encoder_minutes"] == 5 and s.public()["integer_minutes"] == 10 and "lr" not in s.public()


def test_json_has_the_content_of_the_model_file(trained, data, tmp_path, capsys):
    command = f"train --from {trained[1].path} --images {data.photos} --out {tmp_path / 'mine.safetensors'} --json"
    command += f" --run {tmp_path / 'run'} --crop 64 --photos-per-step 2 --encoder-minutes 1 --encoder-steps 1"
    assert main([*command.split(), "--integer-steps", "1", "--every", "1"]) == 0
    printed = capsys.readouterr()
    result, info = json.loads(printed.out), read_info(tmp_path / "mine.safetensors")
    assert (result["model"], result["decoder"], result["encoder"]) == ("mine", info.decoder, info.encoder)
    assert result["vocabulary"]["classes"] == list(data.classes) and result["nbytes"] == os.path.getsize(info.path)
    rows = result["held_out"]
    assert [(row["phase"], row["step"], row["quality"]) for row in rows] == [("integer", 1, q) for q in QUALITIES]
    assert all(row["bpp"] > 0 and row["psnr"] > 0 for row in rows)
    assert "held out" in printed.err and "encoder" in printed.err


@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_help_shows_common_settings_and_help_all_shows_all(option, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", option])
    text = capsys.readouterr().out
    options = set(re.findall(r"^  (?:-\w(?: \w+)?, )?(--[a-z0-9-]+)", text, re.MULTILINE))
    hidden = {"--" + f.name.replace("_", "-") for f in fields(Settings) if not f.metadata["common"]}
    assert end.value.code == 0 and {"--images", "--labels", "--out", "--from", "--preset", "--resume"} <= options
    if option == "--help":
        assert 8 <= len(options) <= 14 and not hidden & options and "--help-all" in text
    else:
        assert hidden <= options and len(options) == len(fields(Settings)) + 6
        assert all(f.metadata["help"].split()[0] in text for f in fields(Settings))


def test_checkpoint_files_stay_below_their_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD", 1000)
    tensors = {f"net.{i}": torch.full((100,), float(i)) for i in range(9)}
    for step in (1, 2):
        checkpoint.save(tmp_path, checkpoint.State("joint", step, 1.5, tensors, {"a": 2**100}))
    files = sorted((tmp_path / "checkpoint").glob("*.safetensors"))
    assert len(files) == 5 and all(f.stat().st_size < 1300 for f in files)
    state = checkpoint.load(tmp_path)
    assert state.step == 2 and state.data_rng == {"a": 2**100} and set(state.tensors) == set(tensors)
    # a crash between the two renames leaves only the previous checkpoint
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert checkpoint.load(tmp_path).step == 2
    (tmp_path / "checkpoint.old" / "3.safetensors").write_bytes(b"x" * 20)
    check_rejects(ConfigurationError, "damaged checkpoint", checkpoint.load, tmp_path)


def test_training_imports_no_zarr():
    """A lent GPU machine has torch, numba, safetensors and pillow, and no Zarr."""
    check_lazy("import deepsic_codec.training.train", unwanted=("zarr", "numcodecs", "google_crc32c", "dask", "xarray"))
    check_lazy("from deepsic_codec.cli.train import resolve", unwanted=("torch", "zarr"))


def test_repeated_balancing_stays_in_the_range_of_integers(monkeypatch):
    """Channels with small values are scaled up each time; adapting an adapted head must not leave the range."""
    head = make_networks(TINY).head.eval()
    monkeypatch.setattr(
        balance_module,
        "_factor",
        lambda stage, name, *rest: torch.full(
            (32 if name.startswith("up") else 16,), 64.0 if name.startswith(("spatial", "up")) else 1.0
        ),
    )
    for _ in range(4):
        balance_head(head, lambda: head(torch.randn(3, 16, 4, 4), torch.tensor([5.0, 50.0, 90.0])))
    for block in head.blocks:
        assert fixed.room(block.spatial.weight, block.spatial.bias, formats.SPATIAL).min() >= 0.999
        assert fixed.room(block.up.weight, block.up.bias, formats.UP).min() >= 0.999
    assert block.spatial.weight.abs().max() > 8, "otherwise nothing was scaled"


def test_fresh_cells_are_of_tiles_and_of_photographs(data, tmp_path):
    s = settings(data, tmp_path)
    tiles = LabelledTiles(s.labels)
    nets = make_networks(architecture_of(s, len(tiles.classes))).eval()
    run = Run(s, nets, Photographs(s.images, s.crop), tiles, "cpu")
    latents, labels, quality = run.cells(64, np.random.default_rng(0))
    assert len(latents) == len(labels) == len(quality) and latents.shape[1:] == (16, 4, 4)
    assert set(labels.tolist()) == set(range(len(tiles.classes) + 1))


@pytest.mark.parametrize(
    "options", [{"architecture": "huge"}, {"device": "cuda", "processes": 2, "labels": []}], ids=str
)
def test_settings_are_checked_before_images_are_read(data, tmp_path, monkeypatch, options):
    monkeypatch.setattr(train, "Photographs", lambda *a, **k: pytest.fail("images were read"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    name = "architecture" if "architecture" in options else "processes"
    check_rejects(ConfigurationError, name, train.train, settings(data, tmp_path / "new", **options))
