"""Fixed-point formats of the transforms, and how training imitates them.

Values are integers in units of a power of two. A layer multiplies integers of 8 bits, sums them without error, adds a
bias, and shifts the sum down with rounding:

    out = clamp(floor((sum_i w_i a_i + bias) / 2^shift + 1/2))

which gives the same integers on every machine, in any order of summation. Training works on real numbers that stand for
such integers, rounded where the integers are rounded (straight-through), so that the trained network is the stored one
(`docs/integer-transforms.md`).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Bits after the binary point of: input pixels less 128 (64 grey levels are one), inputs of 1x1 convolutions, hidden
#: values of a block, the residual stream, latents, normalised latents, output pixels (64ths of a grey level).
PIXEL_BITS, READ_BITS, HIDDEN_BITS, STREAM_BITS = 6, 5, 6, 9
LATENT_BITS, NORMAL_BITS, OUTPUT_BITS = 8, 9, 12
#: Companded latents, which the semantic head reads, and logits, which it writes.
COMPAND_BITS, LOGIT_BITS, LOGIT_MAX = 9, 8, 2047
#: Ranges of the integers: 8 bits, 12 bits signed, twice that before modulation.
READ_LOW, READ_HIGH, HIDDEN_HIGH, STREAM_MAX, STEM_MAX = -128, 127, 255, 2047, 4095
#: Each of the two parts that make a pixel, so that their sum has 16 bits.
PIXEL_MAX = 16383
#: Two digits to the base 128: a high one of 8 bits and a low one of 7 bits.
DIGIT = 128
WIDE_MAX = 127 * DIGIT + 63
#: Weights have 8 bits; sums of products stay below these bounds, so that float32 holds them exactly with their bias
#: (spatial ones also in algorithms that are not exact, such as Winograd's).
WEIGHT_MAX, PRODUCT_SUM, SPATIAL_SUM, BIAS_MAX = 127, 2.0**23, 2.0**19, 2**22
#: A spatial sum is at most 2^20 with its bias and with the half that rounds.
SPATIAL_BIAS_MAX, SPATIAL_EXPONENT_MAX = 2**18, 15
#: Largest exponent of a weight's unit.
EXPONENT_MAX = 20
#: Fraction bits and largest integer of modulation factors.
MODULATION_BITS, MODULATION_MAX = 8, 2047
#: Hidden channels of a residual block for each of its channels.
EXPANSION = 2
#: Whole qualities, each of which has entries of its own in tables.
QUALITIES = 100
#: Fraction bits of dequantiser steps, in units of latents.
STEP_BITS = 8


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


@dataclass(frozen=True)
class Format:
    """Fraction bits and ranges of the integers that a layer reads and writes."""

    in_bits: int
    in_max: int
    out_bits: int
    low: float
    high: float
    spatial: bool = False
    wide_input: bool = False  # of two digits, each multiplied by itself
    wide_weight: bool = False

    @property
    def bound(self) -> float:
        """Bound of sums of the products that are computed in one matrix product."""
        return SPATIAL_SUM if self.spatial else PRODUCT_SUM

    @property
    def bias_max(self) -> int:
        """Largest bias, in units of the sums."""
        return SPATIAL_BIAS_MAX if self.spatial else BIAS_MAX

    @property
    def weight_max(self) -> int:
        """Largest weight."""
        return WIDE_MAX if self.wide_weight else WEIGHT_MAX

    @property
    def exponents(self) -> tuple[int, int]:
        """Least and largest exponent of a weight's unit."""
        lowest = max(0, self.out_bits - self.in_bits)
        if self.wide_weight and self.wide_input:
            lowest += 8  # the product of the two low digits is left out, 7 bits below the rest
        return lowest, SPATIAL_EXPONENT_MAX if self.spatial else EXPONENT_MAX

    @property
    def shifts(self) -> tuple[int, int]:
        """Least and largest shift from sums to the integers that the layer writes."""
        lowest, highest = self.exponents
        return lowest + self.in_bits - self.out_bits, highest + self.in_bits - self.out_bits


SPATIAL = Format(STREAM_BITS, STREAM_MAX, READ_BITS, READ_LOW, READ_HIGH, spatial=True)
UP = Format(READ_BITS, -READ_LOW, HIDDEN_BITS, 0, HIDDEN_HIGH)
DOWN = Format(HIDDEN_BITS, HIDDEN_HIGH, STREAM_BITS, -(2.0**15), 2.0**15)
#: From pixels, from the stream, and from normalised latents to the input of a modulation.
STEM = Format(PIXEL_BITS, -READ_LOW, STREAM_BITS, -STEM_MAX, STEM_MAX)
INNER = Format(READ_BITS, -READ_LOW, STREAM_BITS, -STEM_MAX, STEM_MAX)
LATENT_STEM = Format(NORMAL_BITS, WIDE_MAX, STREAM_BITS, -STEM_MAX, STEM_MAX, wide_input=True)
#: From the stream to latents and to pixels; the linear shortcuts.
TO_LATENT = Format(READ_BITS, -READ_LOW, LATENT_BITS, -WIDE_MAX, WIDE_MAX)
TO_PIXEL = Format(READ_BITS, -READ_LOW, OUTPUT_BITS, -PIXEL_MAX, PIXEL_MAX)
#: Layers of the semantic head.
COMPANDED_STEM = Format(COMPAND_BITS, WIDE_MAX, STREAM_BITS, -STEM_MAX, STEM_MAX, wide_input=True)
TO_LOGIT = Format(HIDDEN_BITS, HIDDEN_HIGH, LOGIT_BITS, -LOGIT_MAX, LOGIT_MAX)
LINEAR_IN = Format(PIXEL_BITS, -READ_LOW, LATENT_BITS, -(2.0**20), 2.0**20, wide_weight=True)
LINEAR_OUT = Format(LATENT_BITS, WIDE_MAX, OUTPUT_BITS, -PIXEL_MAX, PIXEL_MAX, wide_input=True, wide_weight=True)

#: Formats of the layers of each network, by name; those of residual blocks are in a table of their own.
ANALYSIS_LAYERS = {"linear": LINEAR_IN, "stem": STEM, "reduce": INNER, "out": TO_LATENT}
SYNTHESIS_LAYERS = {"linear": LINEAR_OUT, "stem": LATENT_STEM, "expand": INNER, "out": TO_PIXEL}
HEAD_LAYERS = {"stem": COMPANDED_STEM, "hidden": UP, "out": TO_LOGIT}
BLOCK_LAYERS = {"spatial": SPATIAL, "up": UP, "down": DOWN}


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


def export_layer(weight: Tensor, bias: Tensor | None, form: Format) -> dict[str, Tensor]:
    """Integer tensors of a layer: weights int8 (int16 for wide ones), shifts uint8, biases int32.

    Biases are (outputs,) or (N,outputs), as given, and include half of the unit that the sum is shifted down to.
    """
    k = exponents(weight, bias, form)
    unit = torch.exp2(k).reshape(-1, *[1] * (weight.ndim - 1))
    integers = torch.floor(weight.detach() * unit + 0.5).clamp(-form.weight_max, form.weight_max)
    shift = k + form.in_bits - form.out_bits
    values = torch.zeros_like(k) if bias is None else bias.detach()
    start = torch.floor(values * torch.exp2(k + form.in_bits) + 0.5).clamp(-form.bias_max, form.bias_max)
    half = torch.floor(torch.exp2(shift - 1))
    return {
        "weight": integers.to(torch.int16 if form.wide_weight else torch.int8).cpu(),
        "bias": (start + half).to(torch.int32).cpu(),
        "shift": shift.to(torch.uint8).cpu(),
    }


def restore_layer(weight: Tensor, bias: Tensor, shift: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Inverse of `export_layer`: weights in their stored shape, and biases (outputs,) or (N,outputs), float64."""
    exponent = shift.double() - form.in_bits + form.out_bits
    half = torch.floor(torch.exp2(shift.double() - 1))
    weights = weight.double() * torch.exp2(-exponent).reshape(-1, *[1] * (weight.ndim - 1))
    return weights, (bias.double() - half) * torch.exp2(-exponent - form.in_bits)
