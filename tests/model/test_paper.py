"""The paper's own networks: sizes, quantiser, payloads, training."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.families import architecture_from
from deepsic_codec.model.paper import RATES, PaperArchitecture
from deepsic_codec.model.paper_networks import Analysis, ChannelPrior, StaticPrior, Synthesis, rectified
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.torch_scheduler import TorchScheduler
from deepsic_codec.samples import drone_frame
from deepsic_codec.training import train
from deepsic_codec.training.data import Photographs
from deepsic_codec.training.evaluate import complexity
from deepsic_codec.training.loss import Terms
from deepsic_codec.training.paper import STEPS, PaperNetworks, paper_start
from deepsic_codec.training.settings import PRESETS, Settings
from tests.common import check_rejects, psnr
from tests.training.conftest import data, head_only  # noqa: F401  # data is a fixture

SMALL = PaperArchitecture(1.0, (4, 2, 1, 1), filters=8, head_width=8, classes=4)


@pytest.mark.parametrize("rate", RATES)
def test_published_sizes(rate):
    arch = PaperArchitecture(rate, RATES[rate], filters=4, head_width=4)
    x, quality = torch.zeros(2, 3, 64, 96), torch.tensor([1.0, 50.0])
    y = Analysis(arch)(x, quality)
    assert y.shape == (2, arch.latents, 4, 6) and Synthesis(arch)(y, quality).shape == x.shape
    published = PaperArchitecture(rate, RATES[rate])
    shapes = [tuple(c.weight.shape) for c in Analysis(published).convs]
    assert shapes == [(128, 3, 7, 7), (128, 128, 5, 5), (128, 128, 3, 3), (128, 128, 3, 3)]
    assert architecture_from(published.to_json()) == published


def test_quantiser_is_equation_1():
    """Rounding what the analysis gives is ceil(32 f) of features f in [-1, 1]."""
    torch.manual_seed(0)
    net = Analysis(SMALL)
    torch.nn.init.constant_(net.norms[-1].weight, 0.8)
    x = torch.rand(1, 3, 64, 64) * 255
    y = net(x, torch.ones(1))
    f = y - 1 / 64
    symbols = torch.round(y * 32)
    assert f.abs().max() <= 1 and torch.equal(symbols, torch.ceil(f * 32)) and len(symbols.unique()) > 30


def test_multiplications_are_counted_as_they_are():
    arch = PaperArchitecture()
    net, counted = Analysis(arch), []
    for conv in net.convs:
        conv.register_forward_hook(lambda m, i, o: counted.append(m.weight.numel() * o.shape[2] * o.shape[3]))
    net(torch.zeros(2, 3, 64, 64), torch.ones(2))
    cost = complexity(arch)
    assert np.isclose(sum(counted) / 64**2 / 1e3, cost["analysis"])
    assert cost["prior"] == 0 and cost["decoding"] == cost["synthesis"]


def test_linear_start_is_a_transform_and_its_inverse(data):  # noqa: F811
    """With room for all components, nothing is lost but what the quantiser rounds and clips."""
    photos = Photographs([data.photos], 64)
    x = photos.crops(4, 64, np.random.default_rng(1))
    for rate, step in STEPS.items():
        nets = PaperNetworks(PaperArchitecture(rate, (4, 2, 1, 1), filters=192, head_width=4)).train()
        paper_start(nets, photos, 50)
        y = nets.analysis(x, torch.ones(4))
        assert psnr(nets.synthesis(y, torch.ones(4)).detach().numpy(), x.numpy()) > 35
        stored = torch.round(y * 32) / 32
        assert (
            psnr(nets.synthesis(stored, torch.ones(4)).detach().numpy(), x.numpy())
            > 10 * np.log10(12 * 255**2 / step**2) - 1
        )
        sizes, weights = (t.square().mean((0, 2, 3)).sqrt() for t in (y, nets.head.first.weight))
        of_head = (sizes * weights)[sizes > 0.03]
        assert of_head.max() < 6 * of_head.min(), "the head sees all features about equally"
    assert not any(norm.training for norm in nets.modules() if isinstance(norm, torch.nn.BatchNorm2d))


def test_slopes_are_those_of_prelu():
    x, slopes = torch.randn(2, 5, 3, 3), torch.tensor([1.0, 0.0, -1.0, 0.25, 2.0])
    torch.testing.assert_close(rectified(x, slopes), torch.nn.functional.prelu(x, slopes))


def test_contexts_of_training_leave_the_symbol_itself_out():
    prior, symbols = ChannelPrior(SMALL), torch.zeros(1, 32, 5, 5)
    torch.nn.init.ones_(prior.context)
    quality, other = torch.ones(1), symbols.clone()
    other[0, 10, 2, 2] = 9
    before, after = prior(symbols, quality)[1], prior(other, quality)[1]
    changed = [tuple(place) for place in (before != after).nonzero().tolist()]
    around = [(0, 10, y, x) for y in (1, 2, 3) for x in (1, 2, 3) if (y, x) != (2, 2)]
    assert changed == around + [(0, c, 2, 2) for c in range(11, 19)]
    assert torch.equal(*(prior(s, quality, quantised=True)[1] for s in (symbols, other))), "a file has no contexts"


def test_higher_rates_weigh_distortion_more():
    zeros = torch.zeros(2)
    shares = []
    for rate in RATES:
        nets = PaperNetworks(PaperArchitecture(rate, RATES[rate], filters=4, head_width=4))
        of_rate, of_distortion = (
            nets.loss(Terms(zeros + r, zeros + d, zeros), zeros) for r, d in ((1.0, 0.0), (0.0, 1.0))
        )
        shares.append(float(of_distortion / of_rate))
    assert sorted(shares) == shares and shares[-1] > 20 * shares[0]


def test_trained_and_coded_like_any_model(data, tmp_path, monkeypatch):  # noqa: F811
    from deepsic_codec.training.run import ARCHITECTURES

    monkeypatch.setitem(ARCHITECTURES, "paper-test", SMALL)
    tiny = PRESETS["tiny"] | {"architecture": "paper-test", "steps": 30, "lr": 1e-2, "head_batch": 16, "warm_up": 1}
    s = Settings(
        **tiny,
        images=[data.photos],
        labels=[data.tiles],
        out=str(tmp_path / "p.safetensors"),
        run=str(tmp_path / "run"),
    )
    info = train.train(s)
    runtime = TorchScheduler(LoadedModel(info))
    image = drone_frame()[None, 100:270, 100:235]
    for quality in (1.0, 90.0):
        (encoded,) = runtime.encode([image], [quality])
        assert encoded.grid == (11, 9) and encoded.cells.shape == (1, 3, 3, 4)
        arguments = [encoded.features], [image.shape[:3]], [encoded.quantiser]
        (symbols,) = runtime.decode_symbols(*arguments)
        assert symbols.shape == (1, 32, 11, 9) and symbols.min() >= -31 and symbols.max() <= 32
        (decoded,) = runtime.decode(*arguments)
        assert psnr(decoded, image) > 9
    again = Settings(**tiny, images=[data.photos], labels=[data.tiles], start=info.path, run=str(tmp_path / "again"))
    check_rejects(ConfigurationError, "files do not hold the prior", train.train, again)
    other = replace(again, start=s.run, architecture="paper-0.5")
    check_rejects(ConfigurationError, "not those of 'paper-0.5'|--architecture", train.train, other)
    mine = train.train(head_only(data, tmp_path / "mine", info.path))
    assert mine.decoder == info.decoder and mine.head != info.head and mine.vocabulary.classes == data.classes


def test_descriptions_that_no_model_has():
    for changes in ({"strides": [4, 2, 2]}, {"strides": [4, 4, 2, 1]}, {"filters": 0}, {"rate": 0}):
        with pytest.raises(ValueError, match="architecture"):
            architecture_from(PaperArchitecture().to_json() | changes)
    for wrong in ({"family": "paper", "latents": 3}, {"name": "paper"}, {"family": ["paper"]}):
        check_rejects(ValueError, "architecture", architecture_from, wrong)
    tensors = {"mean": torch.zeros(3), "index": torch.zeros(3)}
    check_rejects(ValueError, "other channels", StaticPrior, SMALL, tensors)
