"""Terms of the loss, each compared with the same numbers computed by hand, and the inputs of each network."""

import math

import pytest
import torch

from deepsic_codec.model.networks import step_lambda
from deepsic_codec.payload.constants import quality_step
from deepsic_codec.training import loss
from deepsic_codec.training.run import TINY

CLASSES = 3


class Recorder(loss.Networks):
    """Networks that record their inputs and return plain arithmetic."""

    def __init__(self, latents):
        torch.nn.Module.__init__(self)
        self.latents, self.inputs = latents, {}

    def analysis(self, x, quality):
        self.inputs["analysis"] = x
        return self.latents

    def gains(self, quality):
        return quality[:, None, None, None] / 10

    def synthesis(self, latents, quality):
        self.inputs["synthesis"] = latents
        return latents.mean((1, 2, 3), keepdim=True).expand(-1, 3, 64, 128) * 2

    def head(self, cells, quality):
        self.inputs["head"] = cells, quality
        return torch.stack([cells[:, 0, 0, 0] + k for k in range(CLASSES)], 1)


class Prior:
    """A prior whose bits are the magnitudes of the values."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __call__(self, symbols, quality, quantised):
        self.inputs["prior"] = symbols, quantised
        return torch.zeros_like(symbols), torch.ones_like(symbols)

    def bits(self, values, mean, index):
        self.inputs["bits"] = values
        return values.abs()


@pytest.fixture
def nets():
    torch.manual_seed(0)
    recorder = Recorder((torch.randn(4, 2, 4, 8) * 3).requires_grad_())
    recorder.prior = Prior(recorder.inputs)
    return recorder


QUALITY = torch.tensor([10.0, 20.0, 30.0, 80.0])
IMAGES = torch.full((4, 3, 64, 128), 7.0)


def rounded(nets):
    gain = QUALITY[:, None, None, None] / 10
    return torch.floor(nets.latents * gain + 0.5).detach(), gain


@pytest.mark.parametrize("training", [False, True])
def test_rate_is_of_noisy_latents_and_distortion_of_rounded_ones(nets, training):
    nets.train(training)
    terms = nets.terms(IMAGES, QUALITY, bf16=False, quantised=True)
    symbols, gain = rounded(nets)
    assert torch.equal(nets.inputs["prior"][0].detach(), symbols) and nets.inputs["prior"][1] is True
    torch.testing.assert_close(nets.inputs["synthesis"].detach(), symbols / gain)
    noise = (nets.inputs["bits"] - nets.latents * gain).detach()
    if training:
        assert -0.5 <= float(noise.min()) < -0.4 and 0.4 < float(noise.max()) <= 0.5 and abs(float(noise.mean())) < 0.1
    else:
        assert torch.equal(nets.inputs["bits"].detach(), symbols)
    torch.testing.assert_close(terms.rate, nets.inputs["bits"].abs().sum((1, 2, 3)) / (64 * 128))
    decoded = (symbols / gain).mean((1, 2, 3)) * 2
    torch.testing.assert_close(terms.distortion.detach(), (decoded - 7) ** 2)


def test_the_head_learns_from_both_kinds_of_latents(nets):
    """Float latents of every other image and rounded ones of the rest: one head serves stored and computed labels."""
    terms = nets.terms(IMAGES, QUALITY, bf16=False)
    symbols, gain = rounded(nets)
    cells, per_cell = nets.inputs["head"]
    for image, expected in enumerate((nets.latents[0], (symbols / gain)[1], nets.latents[2], (symbols / gain)[3])):
        for column in range(2):
            number = 2 * image + column
            torch.testing.assert_close(cells[number].detach(), expected[:, :, 4 * column : 4 * column + 4].detach())
            assert per_cell[number] == QUALITY[image]
            torch.testing.assert_close(terms.logits[image, 0, column, 1], cells[number, 0, 0, 0] + 1)
    assert terms.logits.shape == (4, 1, 2, CLASSES)


def test_gradients_pass_rounding(nets):
    """Rate, distortion and head have gradients at the latents, as if the latents were not rounded."""
    gain = QUALITY[:, None, None, None] / 10
    terms = nets.eval().terms(IMAGES, QUALITY, bf16=False)
    symbols, _ = rounded(nets)
    (gradient,) = torch.autograd.grad(terms.rate.sum(), nets.latents, retain_graph=True)
    torch.testing.assert_close(gradient, (symbols.sign() * gain / (64 * 128)).expand_as(gradient))
    (gradient,) = torch.autograd.grad(terms.distortion.sum(), nets.latents, retain_graph=True)
    mean = (symbols / gain).mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, (2 * (2 * mean - 7) * 2 / nets.latents[0].numel()).expand_as(gradient))
    (gradient,) = torch.autograd.grad(terms.logits.sum(), nets.latents)
    expected = torch.zeros_like(gradient)
    expected[:, 0, 0, ::4] = CLASSES
    torch.testing.assert_close(gradient, expected)


def test_cells_are_row_major():
    latents = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12)
    cells = loss.cells_of(latents)
    assert cells.shape == (2 * 2 * 3, 3, 4, 4)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                expected = latents[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                assert torch.equal(cells[(image * 2 + row) * 3 + column], expected)


def test_rate_and_distortion_are_weighted_by_quality():
    terms = loss.Terms(torch.tensor([1.0, 3.0]), torch.tensor([50.0, 8.0]), torch.zeros(2, 1, 1, 2))
    quality = torch.tensor([20.0, 80.0])
    expected = [
        float(quality_step(q)) / 20 * (rate + float(step_lambda(torch.tensor(q))) * distortion)
        for q, rate, distortion in ((20.0, 1.0, 50.0), (80.0, 3.0, 8.0))
    ]
    assert float(loss.Networks(TINY).loss(terms, quality)) == pytest.approx(sum(expected) / 2, rel=1e-5)
    part = terms.slice(slice(1, 2))
    assert (part.rate.tolist(), part.distortion.tolist(), len(part.logits)) == ([3.0], [8.0], 1)


def test_cross_entropy_of_independent_classes():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]])
    targets = torch.tensor([0, 2])

    def bits(logit, is_class):
        probability = 1 / (1 + math.exp(-logit))
        return -math.log(probability if is_class else 1 - probability)

    expected = [sum(bits(float(z), k == t) for k, z in enumerate(row)) for row, t in zip(logits, targets, strict=True)]
    assert float(loss.semantic(logits, targets)) == pytest.approx(sum(expected) / 2, rel=1e-5)
    shaped = logits.reshape(1, 2, 1, 3)
    assert float(loss.semantic(shaped, targets.reshape(1, 2, 1))) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_every_parameter_is_trained_once_and_at_its_rate():
    nets = loss.Networks(TINY)
    groups = nets.groups()
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in nets.parameters()) and len(set(listed)) == len(listed)
    factor = {id(p): group["factor"] for group in groups for p in group["params"]}
    assert factor[id(nets.analysis.linear.weight)] == factor[id(nets.synthesis.linear.weight)] == loss.LINEAR_FACTOR
    assert {factor[id(p)] for p in nets.prior.parameters()} == {loss.PRIOR_FACTOR}
    assert {factor[id(p)] for p in nets.head.parameters()} == {1.0}
