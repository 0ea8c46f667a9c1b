"""Fixed-point formats: what training rounds and clips, and which gradients pass."""

import pytest
import torch

from deepsic_codec.model.exact import fixed, formats


def rounded(x, bits, low, high):
    """The same as `fixed.fixed`, in plain steps."""
    return torch.floor(x * 2.0**bits + 0.5).clamp(low, high) / 2.0**bits


@pytest.mark.parametrize(("bits", "low", "high"), [(0, -3, 3), (5, -128, 127), (6, 0, 255), (3, -7, -2)])
def test_values_are_multiples_within_the_range(bits, low, high):
    x = torch.linspace(-300, 300, 4001) / 2.0**bits
    actual = fixed.fixed(x, bits, low, high)
    assert torch.equal(actual, rounded(x, bits, low, high))
    assert float(actual.min()) == low / 2**bits and float(actual.max()) == high / 2**bits
    assert fixed.fixed(torch.tensor(0.5), 0, -9, 9) == 1 and fixed.fixed(torch.tensor(-0.5), 0, -9, 9) == 0  # ties up


@pytest.mark.parametrize(("bits", "low", "high"), [(0, -3, 3), (5, -128, 127), (6, 0, 255)])
def test_gradients_pass_where_nothing_is_clipped_and_nowhere_else(bits, low, high):
    unit = 2.0**-bits
    inside = torch.tensor([low + 1, low + 1.4, (low + high) / 2, high - 1.4, high - 1]) * unit
    outside = torch.tensor([low - 1000, low - 1, high + 1, high + 1000]) * unit
    x = torch.cat([inside, outside]).requires_grad_()
    slopes = torch.arange(1.0, len(x) + 1)
    fixed.fixed(x, bits, low, high).backward(slopes)
    assert torch.equal(x.grad[: len(inside)], slopes[: len(inside)])
    assert torch.equal(x.grad[len(inside) :], torch.zeros(len(outside)))


def test_rounding_straight_through():
    x = torch.tensor([-1.5, -0.2, 0.5, 2.7], requires_grad=True)
    out = fixed.ste_round(x)
    assert out.tolist() == [-1, 0, 1, 3]
    out.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("form", [formats.UP, formats.DOWN, formats.STEM, formats.LATENT_STEM, formats.LINEAR_IN])
def test_gradients_of_an_imitated_layer_are_those_of_the_layer(form):
    """To inputs, weights, biases and offsets alike, as long as nothing is clipped."""
    torch.manual_seed(1)
    layer = torch.nn.Conv2d(4, 3, 1)
    with torch.no_grad():
        layer.weight.mul_(0.02)
        layer.bias.fill_(0.5)
    x = (torch.rand(2, 4, 3, 3) * 0.2 + 0.3).requires_grad_()
    offset = torch.full((2, 3), 0.01, requires_grad=True)
    slopes = torch.randn(2, 3, 3, 3)
    tensors = [x, layer.weight, layer.bias, offset]
    actual = torch.autograd.grad(fixed.imitate(x, layer, form, offset), tensors, slopes)
    plain = torch.nn.functional.conv2d(x, layer.weight, layer.bias) + offset[:, :, None, None]
    for one, other in zip(actual, torch.autograd.grad(plain, tensors, slopes), strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)
