"""Differentiable networks from the tensors of a model file."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepsic_codec.model.exact import fixed
from deepsic_codec.model.exact.integer import ANALYSIS_FORMATS, BLOCK_FORMATS, HEAD_FORMATS, SYNTHESIS_FORMATS
from deepsic_codec.model.networks import Analysis, Block, Gains, Modulate, QualityTable, SemanticHead, Synthesis
from deepsic_codec.model.prior import DIRECT_BITS, HIDDEN_BITS, INPUT_BITS, Prior
from deepsic_codec.payload.constants import quality_step


@torch.no_grad()
def restore_prior(prior: Prior, tensors: dict[str, Tensor]) -> None:
    """Give a prior the weights of a model file's integer one (its tensors without their common prefix).

    Its tables over quality pass through fewer points than are stored, so that it estimates
    rates, and does not decode.

    Raises
    ------
    KeyError, RuntimeError, ValueError
        If the tensors do not fit the architecture.
    """
    for i, net in enumerate(prior.passes):
        shift = tensors[f"{i}.out_shift"].double()
        _fit(net.out_bias, tensors[f"{i}.out_bias"].double() * torch.exp2(-shift - HIDDEN_BITS))
        if net.has_inputs:
            net.out.weight.copy_(tensors[f"{i}.out"] * torch.exp2(-shift)[:, None])
            for name, bits in (("first", INPUT_BITS), ("second", HIDDEN_BITS)):
                shift = tensors[f"{i}.{name}_shift"].double()
                getattr(net, name).weight.copy_(tensors[f"{i}.{name}"] * torch.exp2(-shift)[:, None])
                bias = tensors[f"{i}.{name}_bias"].double() * torch.exp2(-shift - bits)
                _fit(net.first_bias, bias) if name == "first" else net.second_bias.copy_(bias)
        if hasattr(net, "direct"):
            net.direct.copy_(tensors[f"{i}.direct"].double() * 2.0**-DIRECT_BITS)


@torch.no_grad()
def restore_gains(gains: Gains, tensors: dict[str, Tensor]) -> None:
    """Give gains those of a model file's dequantiser steps."""
    gain = 2.0 ** (fixed.LATENT_BITS + fixed.STEP_BITS) / tensors["step"].double()
    _fit(gains.log2, torch.log2(gain) - torch.log2(_nominal_gain())[:, None])


def _nominal_gain() -> Tensor:
    return 64 / quality_step(torch.arange(1, 101, dtype=torch.float64))


@torch.no_grad()
def restore_transform(network: Analysis | Synthesis, tensors: dict[str, Tensor]) -> None:
    """Give a transform the weights of a model file's integer one.

    Its tables over quality pass through fewer points than are stored: what it computes may
    differ by the last bit.

    Raises
    ------
    KeyError, RuntimeError, ValueError
        If the tensors do not fit the architecture.
    """
    layers = dict(ANALYSIS_FORMATS if isinstance(network, Analysis) else SYNTHESIS_FORMATS)
    for at in (8, 16):
        count = len(getattr(network, f"blocks{at}"))
        layers |= {f"blocks{at}.{i}.{part}": form for i in range(count) for part, form in BLOCK_FORMATS.items()}
        _restore_modulation(getattr(network, f"mod{at}"), tensors, f"mod{at}")
    for name, form in layers.items():
        own = tensors
        if form is fixed.UP and tensors[f"{name}.bias"].ndim > 1:
            own = tensors | {f"{name}.bias": _restore_condition(network.get_submodule(name[:-3]), tensors, name)}
        _restore_layer(network.get_submodule(name), own, name, form)
    if isinstance(network, Synthesis):
        network.input_scale.copy_(torch.exp2(tensors["normaliser"].float()))


@torch.no_grad()
def restore_head(head: SemanticHead, tensors: dict[str, Tensor]) -> None:
    """Give a head in float form the weights of a model file's; the last layer stays new where classes are others."""
    layers = dict(HEAD_FORMATS)
    layers |= {f"blocks.{i}.{part}": form for i in range(len(head.blocks)) for part, form in BLOCK_FORMATS.items()}
    if len(tensors["out.weight"]) != len(head.out.weight):
        del layers["out"]
    for name, form in layers.items():
        _restore_layer(head.get_submodule(name), tensors, name, form)
    _restore_modulation(head.mod, tensors, "mod")


def _restore_layer(conv: nn.Module, tensors: dict[str, Tensor], name: str, form: fixed.Format) -> None:
    weight, shift = tensors[f"{name}.weight"].float(), tensors[f"{name}.shift"].float()
    exponent = shift - form.in_bits + form.out_bits
    if weight.shape != conv.weight.shape:
        raise ValueError(f"{name}: weights of shape {tuple(weight.shape)}, expected {tuple(conv.weight.shape)}")
    conv.weight.copy_(weight * torch.exp2(-exponent).reshape(-1, *[1] * (weight.ndim - 1)))
    if conv.bias is not None:
        start = tensors[f"{name}.bias"].float() - torch.floor(torch.exp2(shift - 1))
        conv.bias.copy_(start * torch.exp2(-exponent - form.in_bits))


def _restore_condition(block: nn.Module, tensors: dict[str, Tensor], name: str) -> Tensor:
    """Give a block's condition its table; returns the bias that is left for the layer, which is what rounds."""
    biases, shift = tensors[f"{name}.bias"].double(), tensors[f"{name}.shift"].double()
    half = torch.floor(torch.exp2(shift - 1))
    exponent = shift - fixed.UP.in_bits + fixed.UP.out_bits
    if not isinstance(block, Block) or block.condition.offset is None:
        raise ValueError(f"{name}: biases for each quality, of an architecture without them")
    _fit(block.condition.offset, (biases - half) * torch.exp2(-exponent - fixed.UP.in_bits))
    return half


def _restore_modulation(modulate: Modulate, tensors: dict[str, Tensor], name: str) -> None:
    bits = fixed.MODULATION_BITS
    _fit(modulate.scale, tensors[f"{name}.scale"].double() * 2.0**-bits - 1)
    offset = tensors[f"{name}.offset"].double() - 2 ** (bits - 1)
    _fit(modulate.offset, offset * 2.0 ** -(fixed.STREAM_BITS + bits))


def _fit(table: QualityTable, values: Tensor) -> None:
    """Knots that come nearest to values (100,C) at whole qualities."""
    knots, channels = table.table.shape
    if values.shape != (100, channels):
        raise ValueError(f"a table over quality of shape {tuple(values.shape)}, expected (100, {channels})")
    probe = QualityTable(knots, knots)
    probe.table.copy_(torch.eye(knots))
    weights = probe(torch.arange(1, 101, dtype=torch.float32)).double()
    table.table.copy_(torch.linalg.lstsq(weights, values.double()).solution.float())
