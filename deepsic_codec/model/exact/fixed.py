"""How training imitates the fixed-point formats of the transforms (`formats`).

Training works on real numbers that stand for integers, rounded where the integers are rounded (straight-through), so
that the trained network is the stored one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepsic_codec.model.exact.formats import DIGIT, WEIGHT_MAX, Format


def ste_round(x: Tensor) -> Tensor:
    """Round to nearest, ties up, with the identity as gradient."""
    return x + (torch.floor(x + 0.5) - x).detach()


def fixed(x: Tensor, bits: int, low: float, high: float) -> Tensor:
    """Round to multiples of 2^-bits within [low, high] such units, as floats.

    Gradients pass where nothing is clipped.
    """
    return _Fixed.apply(x, 2.0**bits, low, high)  # type: ignore[no-untyped-call,no-any-return]


class _Fixed(torch.autograd.Function):
    """Rounding and clipping in few passes over memory: training in fixed point spends most of its time here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: float, high: float) -> Tensor:
        out = (x * scale).add_(0.5).floor_().clamp_(low, high).mul_(1 / scale)
        ctx.save_for_backward(out)
        ctx.bounds = low / scale, high / scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], out, *ctx.bounds), None, None, None


def exponents(weight: Tensor, bias: Tensor | None, form: Format) -> Tensor:
    """Exponents k, per output, with integer weights w 2^k in range and sums, bias included, in bounds.

    The bias is (outputs,), or (N,outputs) where it is one of several.
    """
    return torch.log2(_largest_units(weight, bias, form)).floor().clamp(*form.exponents)


def room(weight: Tensor, bias: Tensor | None, form: Format) -> Tensor:
    """Largest factors, per output, by which weights and biases may grow; below 1 they have no exponent."""
    return _largest_units(weight, bias, form) * 2.0 ** -form.exponents[0]


def _largest_units(weight: Tensor, bias: Tensor | None, form: Format) -> Tensor:
    """Largest 2^k, per output."""
    w = weight.detach().abs().flatten(1)
    largest_input = WEIGHT_MAX if form.wide_input else form.in_max
    scale = DIGIT if form.wide_weight else 1  # the weights' high digits are multiplied
    limits = torch.minimum(
        form.weight_max / w.amax(1).clamp(min=1e-9), scale * form.bound / (w.sum(1) * largest_input).clamp(min=1e-9)
    )
    if bias is not None:
        largest = bias.detach().abs().reshape(-1, len(w)).amax(0)
        limits = torch.minimum(limits, form.bias_max * 2.0**-form.in_bits / largest.clamp(min=1e-9))
    return limits


def quantised_weight(weight: Tensor, bias: Tensor | None, form: Format) -> Tensor:
    """Weights as multiples of their unit, as floats, with straight-through gradient."""
    unit = torch.exp2(exponents(weight, bias, form)).reshape(-1, *[1] * (weight.ndim - 1))
    return ste_round(weight * unit).clamp(-form.weight_max, form.weight_max) / unit


def imitate(
    x: Tensor, layer: nn.Conv2d | nn.Linear, form: Format, offset: Tensor | None = None, biases: Tensor | None = None
) -> Tensor:
    """The integer layer, on real numbers (B,C,h,w) or (B,C) that stand for its integers.

    `offset` (B,outputs) is added to the bias of each image. `biases` (N,outputs) are all biases that can result.
    """
    weight = quantised_weight(layer.weight, layer.bias if biases is None else biases, form)
    exact = form.spatial or form.wide_input or form.wide_weight  # more bits than bfloat16 has
    with (
        torch.autocast(x.device.type, enabled=False)
        if exact
        else torch.autocast(x.device.type, torch.bfloat16, enabled=torch.is_autocast_enabled(x.device.type))
    ):
        x = x.float() if exact else x
        if isinstance(layer, nn.Linear):
            out = F.linear(x, weight).float() + layer.bias
        else:
            out = F.conv2d(x, weight, padding=layer.padding, groups=layer.groups).float()
            out = out if layer.bias is None else out + layer.bias[:, None, None]
            out = out if offset is None else out + offset[:, :, None, None]
    return fixed(out, form.out_bits, form.low, form.high)


def export_layer(weight: Tensor, bias: Tensor | None, form: Format, places: Tensor | None = None) -> dict[str, Tensor]:
    """Integer tensors of a layer: weights int8 (int16 for wide ones), shifts uint8, biases int32.

    Biases are (outputs,) or (N,outputs), as given, and include half of the unit that the sum is shifted down to.
    `places` (outputs,...), int32 as well, are added to them.
    """
    k = exponents(weight, bias if places is None else biases_of_places(bias, places), form)
    unit = torch.exp2(k).reshape(-1, *[1] * (weight.ndim - 1))
    integers = torch.floor(weight.detach() * unit + 0.5).clamp(-form.weight_max, form.weight_max)
    shift = k + form.in_bits - form.out_bits
    values = torch.zeros_like(k) if bias is None else bias.detach()
    start = torch.floor(values * torch.exp2(k + form.in_bits) + 0.5).clamp(-form.bias_max, form.bias_max)
    half = torch.floor(torch.exp2(shift - 1))
    out = {
        "weight": integers.to(torch.int16 if form.wide_weight else torch.int8).cpu(),
        "bias": (start + half).to(torch.int32).cpu(),
        "shift": shift.to(torch.uint8).cpu(),
    }
    if places is not None:
        unit = torch.exp2(k + form.in_bits).reshape(-1, *[1] * (places.ndim - 1))
        integers = torch.floor(places.detach() * unit + 0.5).clamp(-form.bias_max, form.bias_max)
        out["places"] = integers.to(torch.int32).cpu()
    return out


def biases_of_places(bias: Tensor | None, places: Tensor) -> Tensor:
    """Largest magnitudes (N,outputs) of biases (N,outputs) with what is added to them at places (outputs,...)."""
    largest = places.detach().abs().flatten(1).amax(1)
    return largest[None] if bias is None else bias.detach().abs() + largest


def restore_layer(weight: Tensor, bias: Tensor, shift: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Inverse of `export_layer`: weights in their stored shape, and biases (outputs,) or (N,outputs), float64."""
    exponent = shift.double() - form.in_bits + form.out_bits
    half = torch.floor(torch.exp2(shift.double() - 1))
    weights = weight.double() * torch.exp2(-exponent).reshape(-1, *[1] * (weight.ndim - 1))
    return weights, (bias.double() - half) * torch.exp2(-exponent - form.in_bits)
