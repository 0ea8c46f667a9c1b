"""Terms of the loss, each against what the same numbers give by hand: what networks are shown, and what is measured."""

import math

import pytest
import torch

from deepsic_codec.model.networks import step_lambda
from deepsic_codec.payload.constants import quality_step
from deepsic_codec.training import loss

CLASSES = 3


class Shown(torch.nn.Module):
    """Networks that remember what they are shown, and answer with plain arithmetic."""

    def __init__(self, latents):
        super().__init__()
        self.latents, self.seen = latents, {}

    def analysis(self, x, quality):
        self.seen["analysis"] = x
        return self.latents

    def gains(self, quality):
        return quality[:, None, None, None] / 10

    def prior(self, symbols, quality, quantised):
        self.seen["prior"] = symbols, quantised
        return torch.zeros_like(symbols), torch.ones_like(symbols)

    def synthesis(self, latents, quality):
        self.seen["synthesis"] = latents
        return latents.mean((1, 2, 3), keepdim=True).expand(-1, 3, 64, 128) * 2

    def head(self, cells, quality):
        self.seen["head"] = cells, quality
        return torch.stack([cells[:, 0, 0, 0] + k for k in range(CLASSES)], 1)

    def forward(self):
        raise NotImplementedError


class Prior:
    """Bits that are the magnitudes of what is coded."""

    def __init__(self, owner):
        self.owner = owner

    def __call__(self, *args):
        return Shown.prior(self.owner, *args)

    def bits(self, values, mean, index):
        self.owner.seen["bits"] = values
        return values.abs()


@pytest.fixture
def nets():
    torch.manual_seed(0)
    shown = Shown((torch.randn(4, 2, 4, 8) * 3).requires_grad_())
    shown.prior = Prior(shown)
    return shown


QUALITY = torch.tensor([10.0, 20.0, 30.0, 80.0])
IMAGES = torch.full((4, 3, 64, 128), 7.0)


def rounded(nets):
    gain = QUALITY[:, None, None, None] / 10
    return torch.floor(nets.latents * gain + 0.5).detach(), gain


@pytest.mark.parametrize("training", [False, True])
def test_what_is_measured_on_what(nets, training):
    nets.train(training)
    terms = loss.forward_terms(nets, IMAGES, QUALITY, bf16=False, quantised=True)
    symbols, gain = rounded(nets)
    assert torch.equal(nets.seen["prior"][0].detach(), symbols) and nets.seen["prior"][1] is True
    torch.testing.assert_close(nets.seen["synthesis"].detach(), symbols / gain)
    noise = (nets.seen["bits"] - nets.latents * gain).detach()
    if training:
        assert -0.5 <= float(noise.min()) < -0.4 and 0.4 < float(noise.max()) <= 0.5 and abs(float(noise.mean())) < 0.1
    else:
        assert torch.equal(nets.seen["bits"].detach(), symbols)
    torch.testing.assert_close(terms.rate, nets.seen["bits"].abs().sum((1, 2, 3)) / (64 * 128))
    decoded = (symbols / gain).mean((1, 2, 3)) * 2
    torch.testing.assert_close(terms.distortion.detach(), (decoded - 7) ** 2)


def test_the_head_learns_from_both_kinds_of_latents(nets):
    """Every other image as it is analysed, the rest as it is decoded: one head labels while encoding and afterwards."""
    terms = loss.forward_terms(nets, IMAGES, QUALITY, bf16=False)
    symbols, gain = rounded(nets)
    cells, per_cell = nets.seen["head"]
    for image, expected in enumerate((nets.latents[0], (symbols / gain)[1], nets.latents[2], (symbols / gain)[3])):
        for column in range(2):
            number = 2 * image + column
            torch.testing.assert_close(cells[number].detach(), expected[:, :, 4 * column : 4 * column + 4].detach())
            assert per_cell[number] == QUALITY[image]
            torch.testing.assert_close(terms.logits[image, 0, column, 1], cells[number, 0, 0, 0] + 1)
    assert terms.logits.shape == (4, 1, 2, CLASSES)


def test_gradients_pass_rounding(nets):
    """To the latents from the rate, from the distortion and from the head, as if nothing had been rounded."""
    gain = QUALITY[:, None, None, None] / 10
    terms = loss.forward_terms(nets.eval(), IMAGES, QUALITY, bf16=False)
    symbols, _ = rounded(nets)
    (found,) = torch.autograd.grad(terms.rate.sum(), nets.latents, retain_graph=True)
    torch.testing.assert_close(found, (symbols.sign() * gain / (64 * 128)).expand_as(found))
    (found,) = torch.autograd.grad(terms.distortion.sum(), nets.latents, retain_graph=True)
    mean = (symbols / gain).mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, (2 * (2 * mean - 7) * 2 / nets.latents[0].numel()).expand_as(found))
    (found,) = torch.autograd.grad(terms.logits.sum(), nets.latents)
    expected = torch.zeros_like(found)
    expected[:, 0, 0, ::4] = CLASSES
    torch.testing.assert_close(found, expected)


def test_cells_are_row_major():
    latents = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12)
    cells = loss.cells_of(latents)
    assert cells.shape == (2 * 2 * 3, 3, 4, 4)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                expected = latents[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                assert torch.equal(cells[(image * 2 + row) * 3 + column], expected)


def test_rate_and_distortion_are_weighed_by_quality():
    terms = loss.Terms(torch.tensor([1.0, 3.0]), torch.tensor([50.0, 8.0]), torch.zeros(2, 1, 1, 2))
    quality = torch.tensor([20.0, 80.0])
    expected = [
        float(quality_step(q)) / 20 * (rate + float(step_lambda(torch.tensor(q))) * distortion)
        for q, rate, distortion in ((20.0, 1.0, 50.0), (80.0, 3.0, 8.0))
    ]
    assert float(loss.rate_distortion(terms, quality)) == pytest.approx(sum(expected) / 2, rel=1e-5)
    part = terms.of(slice(1, 2))
    assert (part.rate.tolist(), part.distortion.tolist(), len(part.logits)) == ([3.0], [8.0], 1)


def test_cross_entropy_of_independent_classes():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]])
    targets = torch.tensor([0, 2])

    def bits(logit, wanted):
        chance = 1 / (1 + math.exp(-logit))
        return -math.log(chance if wanted else 1 - chance)

    expected = [sum(bits(float(z), k == t) for k, z in enumerate(row)) for row, t in zip(logits, targets, strict=True)]
    assert float(loss.semantic(logits, targets)) == pytest.approx(sum(expected) / 2, rel=1e-5)
    shaped = logits.reshape(1, 2, 1, 3)
    assert float(loss.semantic(shaped, targets.reshape(1, 2, 1))) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_every_parameter_is_trained_once_and_at_its_own_rate():
    from deepsic_codec.training.phases import TINY

    nets = loss.make_networks(TINY)
    groups = nets.groups(0.5, 0.25)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in nets.parameters()) and len(set(listed)) == len(listed)
    factor = {id(p): group["factor"] for group in groups for p in group["params"]}
    assert factor[id(nets.analysis.linear.weight)] == factor[id(nets.synthesis.linear.weight)] == 0.5
    assert {factor[id(p)] for p in nets.prior.parameters()} == {0.25}
    assert {factor[id(p)] for p in nets.head.parameters()} == {1.0}
