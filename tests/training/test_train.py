"""The trainer on tiny networks: phases, exact resume, adapting the head, the model that comes out."""

import csv
import json
import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from deepsic_codec import config
from deepsic_codec.cli.main import main
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.exact import fixed
from deepsic_codec.model.exact.export import export_network, export_prior, restore_prior
from deepsic_codec.model.exact.layers import check_sums
from deepsic_codec.model.exact.transforms import IntegerAnalysis
from deepsic_codec.model.file import load_arrays, read_info, save_model
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.scheduler import Scheduler, get_scheduler
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import eurosat_mosaic
from deepsic_codec.training import balance as balance_module
from deepsic_codec.training import checkpoint, phases, train
from deepsic_codec.training.balance import balance, balance_head
from deepsic_codec.training.data import LabelledTiles, Photographs
from deepsic_codec.training.fold import fold_blocks, idle_blocks
from deepsic_codec.training.graphs import Graphs
from deepsic_codec.training.loss import make_networks
from deepsic_codec.training.measure import QUALITIES
from deepsic_codec.training.run import ARCHITECTURES, TINY, Run, architecture_of
from deepsic_codec.training.settings import PRESETS, Settings, resolve
from deepsic_codec.training.start import networks_of, prior_of
from tests.common import check_lazy, check_rejects, psnr


def settings(data, folder, **changes):
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
    places = {
        "images": [data.photos],
        "labels": [data.tiles],
        "out": str(folder / "model.safetensors"),
        "run": str(folder / "run"),
    }
    return Settings(**(tiny | places | changes))


def losses(folder):
    with open(folder / "run" / "log.csv", newline="") as file:
        return [(r["phase"], int(r["step"]), float(r["loss"])) for r in csv.DictReader(file)]


def check_same_losses(folder, other):
    """Equal to float noise; where symbols are chosen by rounded integers, noise may choose others."""
    found, wanted = losses(folder), losses(other)
    assert [r[:2] for r in found] == [r[:2] for r in wanted]
    for (phase, _, one), (_, _, two) in zip(found, wanted, strict=True):
        assert one == pytest.approx(two, rel=1e-5 if phase in ("joint", "integer") else 2e-4), phase


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
    runtime, tile = Scheduler(LoadedModel(info)), eurosat_mosaic()[None, :96, :130]
    encoded = runtime.encode([tile], [70.0])
    decoded = runtime.decode([encoded[0].features], [(1, 96, 130)], [70.0])[0]
    assert psnr(decoded, tile) > 20 and encoded[0].cells.shape == (1, 2, 3, 4)


def train_interrupted(s, monkeypatch, phase, step):
    """Train up to a Ctrl-C during a step of a phase."""
    make = phases.PHASES[phase]

    def interrupted(run):
        made = make(run)

        def step_and_signal(number, rng):
            if number == step:
                os.kill(os.getpid(), signal.SIGINT)
            return made.step(number, rng)

        return replace(made, step=step_and_signal)

    with monkeypatch.context() as patch:
        patch.setitem(phases.PHASES, phase, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(s)


@pytest.mark.parametrize("phase,step", [("joint", 5), ("integer", 0), ("synthesis", 1), ("prior", 3), ("head", 2)])
def test_interrupted_and_resumed_is_the_same_run(whole, data, tmp_path, monkeypatch, phase, step):
    s = settings(data, tmp_path)
    train_interrupted(s, monkeypatch, phase, step)
    assert losses(tmp_path)[-1][:2] == (phase, step + 1), "Ctrl-C ends the step and writes a checkpoint"
    info = train.train(s, resume=True)
    check_same_losses(tmp_path, whole[0])
    assert (info.decoder, info.head) == (whole[1].decoder, whole[1].head)


def test_rows_and_steps_after_the_checkpoint_are_done_again(whole, data, tmp_path, monkeypatch):
    s = settings(data, tmp_path, checkpoint_steps=4)

    def crashing(run):
        made = original(run)

        def crash(number, rng):
            if number == 6:
                raise RuntimeError("power cut")
            return made.step(number, rng)

        return replace(made, step=crash)

    original = phases.PHASES["joint"]
    with monkeypatch.context() as patch:
        patch.setitem(phases.PHASES, "joint", crashing)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(s)
    assert checkpoint.load(tmp_path / "run").step == 4
    train.train(s, resume=True)
    check_same_losses(tmp_path, whole[0])


def test_adapted_head_leaves_payloads_readable(whole, data, tmp_path, capsys):
    folder, base = whole
    out = tmp_path / "mine.safetensors"
    command = [
        "train",
        "--from",
        base.path,
        "--labels",
        data.tiles,
        "--images",
        data.photos,
        "--out",
        str(out),
        "--run",
        str(tmp_path / "run"),
        "--head-steps",
        "5",
        "--head-batch",
        "16",
        "--crop",
        "64",
        "--parents",
        '{"Green": ["Forest"]}',
    ]
    assert main(command) == 0
    mine = read_info(out)
    assert mine.decoder == base.decoder and mine.head != base.head
    assert mine.vocabulary.parents == {"Green": ("Forest",)} and mine.name == "mine"
    before, after = load_arrays(base), load_arrays(mine)
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    assert changed and all(k.startswith("head.") for k in changed)
    tile = eurosat_mosaic()[None, :64, :64]
    payload = Scheduler(LoadedModel(base)).encode([tile], [50.0])[0].features
    assert Scheduler(LoadedModel(mine)).decode([payload], [(1, 64, 64)], [50.0])[0].shape == tile.shape
    assert "held out" in capsys.readouterr().out
    # broader names stay where none are given
    s = Settings(
        base=str(out),
        labels=[data.tiles],
        out=str(tmp_path / "again.safetensors"),
        run=str(tmp_path / "again"),
        head_steps=1,
        head_batch=4,
        crop=64,
    )
    again = train.train(s)
    assert again.vocabulary == mine.vocabulary


def test_adapted_head_is_trained_within_the_bounds_of_its_integers(whole, data, tmp_path, monkeypatch):
    original, seen = phases.PHASES["head"], []
    monkeypatch.setitem(phases.PHASES, "head", lambda run: seen.append(run.nets.head.bounded) or original(run))
    s = Settings(
        base=whole[1].path,
        labels=[data.tiles],
        out=str(tmp_path / "mine.safetensors"),
        run=str(tmp_path / "run"),
        head_steps=1,
        head_batch=4,
        crop=64,
    )
    train.train(s)
    assert seen == [True]


def test_head_of_other_classes(whole, data, tmp_path, monkeypatch):
    """A base is found by name, and a new vocabulary may have another size."""
    import zipfile

    from PIL import Image

    config.set(model_path=whole[1].path)
    for i, name in enumerate(("Land", "Land", "Sea", "Sea")):
        (tmp_path / "mine" / name).mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(data.tiles) as archive, archive.open(f"train/River/{i}.png") as file:
            Image.open(file).save(tmp_path / "mine" / name / f"{i}.png")
    s = Settings(
        base="model",
        labels=[str(tmp_path / "mine")],
        out=str(tmp_path / "two.safetensors"),
        run=str(tmp_path / "run"),
        head_steps=2,
        head_batch=4,
        crop=64,
    )
    info = train.train(s)
    assert info.vocabulary.names == ("Land", "Sea", "unknown") and info.decoder == whole[1].decoder


def adapting(data, folder, base, **changes):
    """Settings of a run that trains the analysis of a model, and with labels its head."""
    places = {
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
    return Settings(**(places | tiny | changes))


@pytest.fixture(scope="module")
def encoders(whole, data, tmp_path_factory):
    """Models with another analysis than the whole run's, without labels and with them: folders and models."""
    made = {}
    for labels in ([], [data.tiles]):
        folder = tmp_path_factory.mktemp("encoder")
        made[bool(labels)] = folder, train.train(adapting(data, folder, whole[1], labels=labels))
    return made


@pytest.mark.parametrize("labelled", [False, True])
def test_another_analysis_for_the_same_decoder(whole, encoders, labelled):
    (_, base), (folder, mine) = whole, encoders[labelled]
    wanted = ["encoder", "integer", "head"][: 3 if labelled else 2]
    assert [p for p, n, _ in losses(folder) if n == 1] == wanted
    assert mine.decoder == base.decoder and mine.encoder != base.encoder and (mine.head == base.head) != labelled
    assert mine.vocabulary.names == base.vocabulary.names
    before, after = load_arrays(base), load_arrays(mine)
    assert before.keys() == after.keys()
    changed = {".".join(k.split(".")[:2]) for k in before if not np.array_equal(before[k], after[k])}
    assert {k for k in changed if not k.startswith("head.")} == {"encoder.analysis"}
    assert any(k.startswith("head.") for k in changed) == labelled
    tile = eurosat_mosaic()[None, :80, :112]
    old, new = Scheduler(LoadedModel(base)), Scheduler(LoadedModel(mine))
    payload = new.encode([tile], [60.0])[0].features
    assert payload != old.encode([tile], [60.0])[0].features
    pixels = [r.decode([payload], [(1, 80, 112)], [60.0])[0] for r in (old, new)]
    np.testing.assert_array_equal(*pixels)
    assert psnr(pixels[0], tile) > 20


@pytest.mark.parametrize("order", [1, -1])
def test_name_decides_which_analysis_encodes(whole, encoders, monkeypatch, order):
    """Decoder and head are the same in both files, and so is what arrays and payloads say of them."""
    from deepsic_codec import DeepSIC, create_array

    models = [whole[1], encoders[False][1]]
    config.set(model_path=[m.path for m in models][::order])
    assert find_model(models[0].decoder) == models[::order][0]
    tile = eurosat_mosaic()[:64, :64]
    payloads = []
    for info in models:
        codec = DeepSIC(model=info.name, quality=60).resolved()
        assert (codec.decoder, codec.head) == (models[0].decoder, models[0].head)
        payloads.append(codec.encode(tile))
        assert Scheduler(LoadedModel(info)).encode([tile[None]], [60.0])[0].features in payloads[-1]
        stored = create_array({}, name="a", data=tile, codec=codec)
        np.testing.assert_array_equal(stored[...], codec.decode(payloads[-1]))
    assert payloads[0] != payloads[1]
    assert get_scheduler(models[0]) is not get_scheduler(models[1])
    again = [codec.decode(payloads[1]) for codec in (DeepSIC(model=m.name) for m in models)]
    np.testing.assert_array_equal(*again)


def test_rate_is_measured_where_the_prior_is_a_models(encoders):
    for folder, _ in encoders.values():
        with open(folder / "run" / "held_out.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {r["phase"] for r in rows} >= {"encoder", "integer"} and rows[0]["step"] == "0"
        assert all(0.05 < float(r["bpp"]) < 12 and 10 < float(r["psnr"]) < 60 for r in rows)


@pytest.mark.parametrize("phase,step", [("encoder", 2), ("integer", 0), ("head", 1)])
def test_interrupted_training_of_an_analysis(whole, encoders, data, tmp_path, monkeypatch, phase, step):
    folder, mine = encoders[True]
    s = adapting(data, tmp_path, whole[1], labels=[data.tiles])
    train_interrupted(s, monkeypatch, phase, step)
    assert losses(tmp_path)[-1][:2] == (phase, step + 1)
    info = train.train(s, resume=True)
    np.testing.assert_allclose([r[2] for r in losses(tmp_path)], [r[2] for r in losses(folder)], rtol=1e-5)
    assert (info.encoder, info.head, info.decoder) == (mine.encoder, mine.head, mine.decoder)


def test_an_analysis_is_resumed_as_it_began(whole, encoders, data, tmp_path):
    folder, _ = encoders[True]
    _, base = whole
    s = adapting(data, folder, base, labels=[data.tiles], encoder_steps=0)
    check_rejects(ConfigurationError, "--encoder-minutes|as it began", train.train, s, resume=True)
    arrays = load_arrays(base)
    arrays["decoder.gains.step"] = arrays["decoder.gains.step"] + 1
    other = save_model(tmp_path / "o.safetensors", "o", arrays, base.architecture, base.vocabulary, {})
    s = adapting(data, folder, other, labels=[data.tiles])
    check_rejects(ConfigurationError, f"decoder of the checkpoint is {base.decoder}", train.train, s, resume=True)


def test_model_without_labels_keeps_having_none_or_learns_them(whole, data, tmp_path):
    s = settings(data, tmp_path, labels=[], steps=2, synthesis_steps=0, prior_steps=1)
    base = train.train(s)
    assert base.vocabulary.names == ("unknown",)
    (tmp_path / "a").mkdir()
    mine = train.train(adapting(data, tmp_path / "a", base, encoder_steps=1, integer_minutes=0.0))
    assert (mine.decoder, mine.head) == (base.decoder, base.head) and mine.encoder != base.encoder
    (tmp_path / "b").mkdir()
    mine = train.train(adapting(data, tmp_path / "b", base, labels=[data.tiles], encoder_steps=1, integer_steps=0))
    assert mine.decoder == base.decoder and mine.vocabulary.classes == data.classes


def test_only_integer_networks_have_their_analysis_trained(whole, data, tmp_path):
    _, base = whole
    for name, architecture in (
        ("float", base.architecture | {"integer": False}),
        ("paper", ARCHITECTURES["paper-0.5"].to_json()),
    ):
        info = save_model(
            tmp_path / f"{name}.safetensors",
            name,
            {"decoder.a": np.ones(3, np.float16)},
            architecture,
            Vocabulary((), {}),
            {},
        )
        s = adapting(data, tmp_path / name, info, images=["missing"])
        check_rejects(ConfigurationError, f"{name!r} has networks in floating point|--labels", train.train, s)
        assert not s.folder.exists()


def some_images(nets):
    """What a transform is calibrated on, and a call that runs the analysis on it."""
    x = torch.from_numpy(eurosat_mosaic()[:128, :192].copy()).permute(2, 0, 1)[None].float()
    return x, lambda: nets.analysis(x, torch.tensor([50.0]))


@pytest.mark.parametrize("idle8,idle16", [({0}, {0, 1, 2}), ({1}, {1}), (set(), {2}), ({0, 1}, {0, 2})])
def test_idle_blocks_are_left_out_and_nothing_changes(idle8, idle16):
    torch.manual_seed(0)
    arch = replace(TINY, analysis_blocks=(2, 3))
    analysis = make_networks(arch).eval().requires_grad_(False).analysis
    analysis.out.weight.normal_(0, 0.1)
    for blocks, idle in ((analysis.blocks8, idle8), (analysis.blocks16, idle16)):
        for number, block in enumerate(blocks):
            block.down.bias.normal_(0, 0.5)
            if number in idle:
                block.up.bias.fill_(-1000)
    analysis.integer = True
    images, quality = torch.randint(0, 256, (3, 3, 64, 48)).float(), torch.tensor([10.0, 50.0, 90.0])
    found = idle_blocks(analysis, lambda: analysis(images, quality))
    assert found == {8: idle8, 16: idle16}
    tensors = export_network(analysis)
    folded, n8 = fold_blocks(tensors, 8, idle8)
    folded, n16 = fold_blocks(folded, 16, idle16)
    assert (n8, n16) == (2 - len(idle8), 3 - len(idle16)) and len(folded) < len(tensors)
    cpu = torch.device("cpu")
    grey = (images.permute(0, 2, 3, 1) - 128).to(torch.int8).contiguous()
    before, after = (
        IntegerAnalysis(a, t, cpu)(grey, None, quality.long())
        for a, t in ((arch, tensors), (replace(arch, analysis_blocks=(n8, n16)), folded))
    )
    assert torch.equal(before, after) and before.unique().numel() > 50


def test_a_block_whose_constant_fits_nowhere_stays():
    analysis = make_networks(TINY).eval().requires_grad_(False).analysis
    analysis.integer = True
    tensors = export_network(analysis)
    tensors["blocks16.0.down.bias"][:] = 2**26
    tensors["blocks16.0.down.shift"][:] = 1
    kept, count = fold_blocks(tensors, 16, {0})
    assert count == 1 and kept.keys() == tensors.keys()


def test_balance_makes_room_and_enlarges_only_where_asked():
    torch.manual_seed(0)
    nets = make_networks(TINY).eval().requires_grad_(False)
    _, run = some_images(nets)
    stem = nets.analysis.stem
    stem.weight.mul_(0.01)
    stem.weight[0] *= 1e5
    before = stem.weight.clone()
    balance([nets.analysis], run, largest=1.0)
    assert (stem.weight[0].abs() < before[0].abs()).any() and torch.equal(stem.weight[1:], before[1:])
    balance([nets.analysis], run)
    assert (stem.weight[1:].abs() > before[1:].abs()).any(1).all()


@torch.no_grad()
@pytest.mark.parametrize("largest", [1.0, 64.0])
def test_balance_leaves_what_bounds_clip_as_it_is(largest):
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
        balance([nets.analysis], run, largest)
        outs.append((before, run()))
    torch.testing.assert_close(*outs[0], rtol=1e-3, atol=1e-3)
    if largest == 1:
        torch.testing.assert_close(*outs[1], rtol=1e-3, atol=1e-3)
        nets.bounded = False
        assert (run() - outs[1][0]).abs().max() > 0.1, "or nothing was clipped"


@torch.no_grad()
def test_scores_mean_the_same_after_a_sure_head_is_rounded():
    """Logits far beyond what 8 bits can say are clipped; to scale them down would make every score a middling one."""
    torch.manual_seed(0)
    nets = make_networks(TINY).eval()
    nets.head.out.weight.mul_(400)
    cells, quality = torch.randn(64, TINY.latents, 4, 4), torch.full((64,), 50.0)
    before = torch.sigmoid(nets.head(cells, quality))
    assert nets.head(cells, quality).abs().amax() > 30
    balance_head(nets.head, lambda: nets.head(cells, quality))
    nets.head.integer = True
    after = torch.sigmoid(nets.head(cells, quality))
    sure = (before < 0.001) | (before > 0.999)
    assert sure.float().mean() > 0.3 and ((after - before).abs()[sure] < 0.02).float().mean() > 0.9


def test_low_qualities_are_drawn_more_often_if_asked(data, tmp_path):
    mean = []
    for power in (1.0, 2.0):
        torch.manual_seed(0)
        s = settings(data, tmp_path, quality_low=10.0, quality_high=90.0, quality_power=power)
        drawn = Run(s, make_networks(TINY), None, None, "cpu").qualities(4000)
        assert drawn.min() >= 10 and drawn.max() <= 90
        mean.append(float(drawn.mean()))
    assert mean == pytest.approx([50, 10 + 80 / 3], abs=2)


@pytest.mark.parametrize("form", [fixed.SPATIAL, fixed.UP, fixed.DOWN, fixed.STEM])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-3, 0.1, 1.0])
def test_any_weights_and_biases_are_stored_in_the_range_of_exact_sums(form, size):
    rng = torch.Generator().manual_seed(1)
    shape = (40, 1, 3, 3) if form.spatial else (40, 24, 1, 1)
    weight = torch.randn(shape, generator=rng) * size
    bias = torch.linspace(-3.9, 3.9, 40)
    stored = fixed.export_layer(weight, bias, form)
    check_sums("layer", stored["weight"], stored["bias"], stored["shift"], form)
    shift = stored["shift"].double()
    own = (stored["bias"] - torch.floor(torch.exp2(shift - 1))) * torch.exp2(-shift - form.out_bits)
    assert float((own - bias).abs().max()) < 2.0**-form.out_bits, "a bias is not cut off"


@pytest.mark.parametrize("released", [False, True])
def test_restored_prior_exports_what_is_stored(whole, released):
    base = find_model("base") if released else whole[1]
    nets = networks_of(base, len(base.vocabulary.classes))
    stored, again = prior_of(base), export_prior(nets.prior)
    assert stored.keys() == again.keys() and stored["1.first"].any() and stored["1.second"].any()
    # a row that rounding left just below a bound may come out with twice its integers, which is the same row
    finer = {k: again[k].long() - shift.long() for k, shift in stored.items() if k.endswith("_shift")}
    assert all(((more == 0) | (more == 1)).all() for more in finer.values())
    for name, tensor in stored.items():
        layer = name.removesuffix("_bias")
        more = finer.get(f"{layer}_shift", torch.zeros(1))
        unit = torch.exp2(more.float()) if name != layer else torch.exp2(more.float())[:, None]
        if name not in finer:
            most = 1 if name.endswith("_bias") else 0
            assert float((tensor - again[name] / unit).abs().max()) <= most, name
    with pytest.raises(KeyError):
        restore_prior(nets.prior, {k: v for k, v in stored.items() if k != "1.second_shift"})


def test_start_takes_another_runs_networks_or_says_why_not(whole, data, tmp_path):
    folder, _ = whole
    s = settings(
        data,
        tmp_path,
        start=str(folder / "run"),
        steps=0,
        integer_steps=0,
        synthesis_steps=0,
        prior_steps=0,
        head_steps=1,
    )
    train.train(s)
    one, two = (checkpoint.load(f / "run").below("net") for f in (folder, tmp_path))
    assert torch.equal(one["analysis.stem.weight"], two["analysis.stem.weight"])
    s = settings(data, tmp_path / "other", start=str(folder / "run"), architecture="base")
    words = "cannot start from these networks|analysis_widths [128, 256], not [8, 16]"
    check_rejects(ConfigurationError, words, train.train, s)


def test_resume_and_fresh_start_are_not_mixed_up(whole, data, tmp_path):
    folder, _ = whole
    check_rejects(ConfigurationError, "has a checkpoint|--resume", train.train, settings(data, folder))
    check_rejects(ConfigurationError, "no run to resume", resolve, {"run": str(tmp_path)}, resume=True)
    assert resolve({"run": str(folder / "run"), "steps": 9}, resume=True).steps == 9
    other = ({"labels": []}, "of the checkpoint is|asked for"), ({"optimiser": "adam"}, "--optimiser soap")
    for changes, words in other:
        check_rejects(ConfigurationError, words, train.train, settings(data, folder, **changes), resume=True)


def test_short_phases_do_not_end_while_they_warm_up():
    rates = {n: [train.schedule(i / n, i, 200) for i in range(n)] for n in (50, 10000)}
    for n, found in rates.items():
        assert found.index(max(found)) <= n // 10 and max(found) > 0.95
        assert found[0] == pytest.approx(1 / 200) and 0.01 <= found[-1] < 0.02
    assert rates[10000][100] == pytest.approx(0.5, abs=0.01)


def joint_run(data, folder, device="cpu"):
    """Tiny networks in their joint phase, without noise, their parameters, and what a step takes."""
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


def taken(parameters):
    """Their gradients, which are forgotten."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def test_photographs_and_tiles_count_in_one_batch_as_they_do_apart(data, tmp_path):
    run, parameters, (photos, q, tiles, labels, tiles_q) = joint_run(data, tmp_path)
    together = phases.joint_gradients(run, photos, q, tiles, labels, tiles_q)
    gradients = taken(parameters)
    first = phases.backward(run, [(run.nets.terms(photos, q, False), q, None)])
    second = phases.backward(run, [(run.nets.terms(tiles, tiles_q, False), tiles_q, labels)])
    torch.testing.assert_close(together["loss"], first["loss"] + second["loss"])
    for one, other in zip(gradients, taken(parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert together.keys() == first.keys() | second.keys() and any(g.any() for g in gradients)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_is_the_step(data, tmp_path):
    run, parameters, drawn = joint_run(data, tmp_path, "cuda")
    graphs = Graphs(partial(phases.joint_gradients, run), parameters)
    for factor in (1.0, 0.5):
        drawn[0] = drawn[0] * factor
        wanted = phases.joint_gradients(run, *drawn)
        gradients = taken(parameters)
        seen = graphs(*drawn)
        for name, value in wanted.items():
            torch.testing.assert_close(seen[name], value, rtol=1e-3, atol=1e-4)
        for one, other in zip(gradients, taken(parameters), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_out_of_memory_says_which_setting_to_lower(data, tmp_path, monkeypatch):
    def full(*drawn):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(phases, "joint_gradients", full)
    words = "lower --photos-per-step (now 2)|--mosaics-per-step|--crop (now 64)|--data-device cpu"
    check_rejects(ConfigurationError, words, train.train, settings(data, tmp_path))


def test_settings_that_cannot_work():
    for changes, words in [
        ({"crop": 100}, "crop: expected a multiple of 64"),
        ({"quality_low": 60, "quality_high": 50}, "1 <= low <= high <= 100"),
        ({"optimiser": "sgd"}, "optimiser: expected soap or adam"),
        ({"every": 0}, "every: expected at least 1"),
        ({"images": []}, "nothing to train on"),
        ({"base": "base"}, "needs labelled images"),
        ({"base": "base", "labels": ["x"], "start": "y"}, "exclude each other"),
        ({"encoder_minutes": 1.0}, "--encoder-minutes is for --from"),
        ({"base": "base", "labels": ["x"], "images": [], "encoder_minutes": 1.0}, "add --images"),
        ({"base": "base", "encoder_minutes": 1.0, "encoder_steps": 0}, "--labels|--encoder-minutes"),
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


def test_settings_in_a_model_are_those_that_had_a_say(data, tmp_path):
    whole = settings(data, tmp_path).public()
    assert {"minutes", "architecture", "prior_steps"} <= whole.keys() and "encoder_steps" not in whole
    s = Settings(base="/x/base.safetensors", labels=["/y/t.zip"])
    assert s.public()["base"] == "base" and s.public()["labels"] == ["t.zip"]
    assert {"minutes", "architecture", "prior_steps", "integer_minutes", "encoder_minutes"}.isdisjoint(s.public())
    s = replace(s, images=["p"], encoder_minutes=5.0)
    assert s.public()["encoder_minutes"] == 5 and s.public()["integer_minutes"] == 10 and "lr" not in s.public()


def test_json_tells_what_the_model_holds(whole, data, tmp_path, capsys):
    command = [
        "train",
        "--from",
        whole[1].path,
        "--images",
        data.photos,
        "--out",
        str(tmp_path / "mine.safetensors"),
        "--run",
        str(tmp_path / "run"),
        "--crop",
        "64",
        "--photos-per-step",
        "2",
        "--encoder-minutes",
        "1",
        "--encoder-steps",
        "1",
        "--integer-steps",
        "1",
        "--every",
        "1",
        "--plot",
        "--json",
    ]
    assert main(command) == 0
    printed = capsys.readouterr()
    found, info = json.loads(printed.out), read_info(tmp_path / "mine.safetensors")
    assert (found["model"], found["decoder"], found["encoder"]) == ("mine", info.decoder, info.encoder)
    assert found["vocabulary"]["classes"] == list(data.classes) and found["nbytes"] == os.path.getsize(info.path)
    assert [(r["phase"], r["step"], r["quality"]) for r in found["held_out"]] == [("integer", 1, q) for q in QUALITIES]
    assert all(r["bpp"] > 0 and r["psnr"] > 0 for r in found["held_out"])
    assert "held out" in printed.err and "encoder" in printed.err


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
    check_lazy("from deepsic_codec.cli.train import resolve", unwanted=("torch", "zarr"))


def test_what_is_balanced_again_and_again_still_has_integers(monkeypatch):
    """Channels that hardly do anything are scaled up each time; adapting an adapted head must not run out of range."""
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
        assert fixed.room(block.spatial.weight, block.spatial.bias, fixed.SPATIAL).min() >= 0.999
        assert fixed.room(block.up.weight, block.up.bias, fixed.UP).min() >= 0.999
    assert block.spatial.weight.abs().max() > 8, "or nothing was scaled"


def test_fresh_cells_are_of_tiles_and_of_photographs(data, tmp_path):
    s = settings(data, tmp_path)
    tiles = LabelledTiles(s.labels)
    nets = make_networks(architecture_of(s, len(tiles.classes))).eval()
    run = Run(s, nets, Photographs(s.images, s.crop), tiles, "cpu")
    latents, labels, quality = run.cells(64, np.random.default_rng(0))
    assert len(latents) == len(labels) == len(quality) and latents.shape[1:] == (16, 4, 4)
    assert set(labels.tolist()) == set(range(len(tiles.classes) + 1))
