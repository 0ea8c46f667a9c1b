"""Tensors of a model file from trained networks, and trained networks from these tensors.

Both directions walk over the same layers (`_layers`, `_steps`). Networks that come back from a file estimate rates and
go on training, but do not decode: their tables over quality pass through fewer points than are stored, so that results
may differ by the last bit.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from deepsic_codec.model.exact import fixed, formats
from deepsic_codec.model.exact.checks import check_prior_sums
from deepsic_codec.model.exact.formats import QUALITIES, TRELLIS_STEP
from deepsic_codec.model.exact.prior_formats import COMPANDED, DIRECT_BITS, HIDDEN_BITS, INPUT_BITS, PRIOR_BIAS_MAX
from deepsic_codec.model.networks import Analysis, Filter, Gains, Modulate, QualityTable, SemanticHead, Synthesis
from deepsic_codec.model.prior import IntLinear, Prior, StepNetwork, compand
from deepsic_codec.payload.constants import quality_step

Tensors = Mapping[str, Tensor]
Network = Analysis | Synthesis | SemanticHead


def _layers(network: Network) -> Iterator[tuple[str, nn.Conv2d | nn.Linear, formats.Format, QualityTable | None]]:
    """Names in the file, layers, formats, and tables over quality that the biases of some layers have."""
    for name, form in network.formats.items():
        yield name, getattr(network, name), form, None
    for blocks in network.block_lists:
        for i, block in enumerate(getattr(network, blocks)):
            for part, form in formats.BLOCK_LAYERS.items():
                yield (
                    f"{blocks}.{i}.{part}",
                    getattr(block, part),
                    form,
                    block.condition.offset if part == "up" else None,
                )


@torch.no_grad()
def export_network(network: Network) -> dict[str, Tensor]:
    """Integer tensors of a transform or of the semantic head, on the CPU."""
    out: dict[str, Tensor] = {}
    for name, layer, form, table in _layers(network):
        bias = layer.bias
        if bias is not None and table is not None:
            bias = bias + table(_qualities(bias.device))
        out |= {f"{name}.{k}": v for k, v in fixed.export_layer(layer.weight, bias, form).items()}
    for name in network.modulations:
        out |= {f"{name}.{k}": v for k, v in _export_modulation(getattr(network, name)).items()}
    if isinstance(network, Synthesis):
        out["normaliser"] = torch.log2(network.normaliser()).to(torch.int8).cpu()
        out |= _export_filter(network.filter)
    if isinstance(network, SemanticHead):
        latents = torch.arange(formats.WIDE_MAX + 1, dtype=torch.float64) * 2.0**-formats.LATENT_BITS
        out["compand"] = torch.floor(torch.asinh(2 * latents) * 2**formats.COMPAND_BITS + 0.5).to(torch.int16)
        logits = torch.arange(-formats.LOGIT_MAX, formats.LOGIT_MAX + 1, dtype=torch.float64) * 2.0**-formats.LOGIT_BITS
        out["score"] = torch.floor(torch.sigmoid(logits) * 255 + 0.5).to(torch.uint8)
    return out


@torch.no_grad()
def restore_network(network: Network, tensors: Tensors) -> None:
    """Give a network the weights of a model file; a head's last layer stays as it is where the classes differ.

    Raises
    ------
    KeyError, RuntimeError, ValueError
        If the tensors do not fit the architecture.
    """
    for name, layer, form, table in _layers(network):
        weight, bias, shift = (tensors[f"{name}.{part}"] for part in ("weight", "bias", "shift"))
        if isinstance(network, SemanticHead) and name == "out" and len(weight) != len(layer.weight):
            continue
        if weight.shape != layer.weight.shape or (bias.ndim > 1) != (table is not None):
            raise ValueError(f"{name}: weights or biases of another shape, expected {tuple(layer.weight.shape)}")
        weights, biases = fixed.restore_layer(weight, bias, shift, form)
        layer.weight.copy_(weights)
        if table is not None:
            _fit(table, biases)
            biases = torch.zeros_like(biases[0])
        if layer.bias is not None:
            layer.bias.copy_(biases)
    for name in network.modulations:
        _restore_modulation(getattr(network, name), tensors[f"{name}.scale"], tensors[f"{name}.offset"])
    if isinstance(network, Synthesis):
        network.input_scale.copy_(torch.exp2(tensors["normaliser"].float()))
        _restore_filter(network.filter, tensors)


def _export_filter(network: Filter) -> dict[str, Tensor]:
    up, form = network.up, formats.FILTER_UP
    assert up.bias is not None and network.condition.offset is not None
    quality = _qualities(up.bias.device)
    layer = fixed.export_layer(up.weight, up.bias + network.condition.offset(quality), form, network.places)
    out = {f"filter_up.{name}": values for name, values in layer.items()}
    down = fixed.export_layer(network.down.weight, network.down.bias, formats.FILTER_DOWN)
    scale = torch.floor((1 + network.scale(quality)[:, 0]) * 2**formats.MODULATION_BITS + 0.5)
    out["filter_down.scale"] = scale.clamp(0, formats.FILTER_SCALE_MAX).to(torch.int16).cpu()
    return out | {f"filter_down.{name}": values for name, values in down.items()}


def _restore_filter(network: Filter, tensors: Tensors) -> None:
    weight, bias, shift = (tensors[f"filter_up.{part}"] for part in ("weight", "bias", "shift"))
    if weight.shape != network.up.weight.shape:
        raise ValueError(f"filter_up: weights of another shape, expected {tuple(network.up.weight.shape)}")
    weights, biases = fixed.restore_layer(weight, bias, shift, formats.FILTER_UP)
    assert network.up.bias is not None and network.condition.offset is not None and network.down.bias is not None
    network.up.weight.copy_(weights)
    network.up.bias.zero_()
    _fit(network.condition.offset, biases)
    unit = torch.exp2(shift.double() - formats.FILTER_UP.in_bits + formats.FILTER_UP.out_bits)
    places = tensors["filter_up.places"].double() * 2.0**-formats.FILTER_UP.in_bits
    network.places.copy_(places / unit[:, None, None])
    weight, bias, shift = (tensors[f"filter_down.{part}"] for part in ("weight", "bias", "shift"))
    weights, biases = fixed.restore_layer(weight, bias, shift, formats.FILTER_DOWN)
    network.down.weight.copy_(weights)
    network.down.bias.copy_(biases)
    _fit(network.scale, tensors["filter_down.scale"].double()[:, None] * 2.0**-formats.MODULATION_BITS - 1)


def _export_modulation(modulate: Modulate) -> dict[str, Tensor]:
    quality = _qualities(modulate.scale.table.device)
    bits, largest = formats.MODULATION_BITS, formats.MODULATION_MAX
    scale = torch.floor((1 + modulate.scale(quality)) * 2**bits + 0.5).clamp(-largest, largest)
    offset = torch.floor(modulate.offset(quality) * 2 ** (formats.STREAM_BITS + bits) + 0.5)
    offset = offset.clamp(-formats.BIAS_MAX, formats.BIAS_MAX) + 2 ** (bits - 1)
    return {"scale": scale.to(torch.int16).cpu(), "offset": offset.to(torch.int32).cpu()}


def _restore_modulation(modulate: Modulate, scale: Tensor, offset: Tensor) -> None:
    bits = formats.MODULATION_BITS
    _fit(modulate.scale, scale.double() * 2.0**-bits - 1)
    _fit(modulate.offset, (offset.double() - 2 ** (bits - 1)) * 2.0 ** -(formats.STREAM_BITS + bits))


@torch.no_grad()
def export_gains(gains: Gains) -> dict[str, Tensor]:
    """Dequantiser steps, and half steps with a trellis, int32 (QUALITIES,C) in 2^-STEP_BITS units of latents."""
    quality = _qualities(gains.log2.table.device)
    step = 2.0 ** (formats.LATENT_BITS + formats.STEP_BITS) / gains(quality)[:, :, 0, 0].double()
    tables = {"step": step, "half": step * (TRELLIS_STEP / 2)}
    return {name: torch.floor(table + 0.5).clamp(1, 2.0**22).to(torch.int32).cpu() for name, table in tables.items()}


@torch.no_grad()
def restore_gains(gains: Gains, tensors: Tensors) -> None:
    """Give gains the dequantiser steps of a model file."""
    gain = 2.0 ** (formats.LATENT_BITS + formats.STEP_BITS) / tensors["step"].double()
    nominal = 64 / quality_step(_qualities(torch.device("cpu")).double())
    _fit(gains.log2, torch.log2(gain) - torch.log2(nominal)[:, None])


def _steps(prior: Prior) -> Iterator[tuple[str, StepNetwork, dict[str, tuple[IntLinear, int]]]]:
    """Prefix of the names, network, and layers with the fraction bits of their input, of each step."""
    for i, step in enumerate(prior.networks):
        assert isinstance(step, StepNetwork)
        bits = {"first": INPUT_BITS, "second": HIDDEN_BITS, "out": HIDDEN_BITS} if step.has_inputs else {}
        yield f"{i}.", step, {name: (getattr(step, name), unit) for name, unit in bits.items()}


@torch.no_grad()
def export_prior(prior: Prior) -> dict[str, Tensor]:
    """Integer tensors of a prior on the CPU: weights int8, shifts uint8, biases int32, for each whole quality.

    Raises
    ------
    ValueError
        If weights are too large for sums to be exact.
    """
    out: dict[str, Tensor] = {}
    quality = _qualities(torch.device("cpu"))
    for prefix, step, layers in _steps(prior):
        biases = {"out": step.out_bias(quality)}
        shifts = {"out": torch.full((2 * step.count,), 8.0)}  # of a step without inputs
        if layers:
            biases |= {"first": step.first_bias(quality), "second": step.second_bias}
        units = {"out": HIDDEN_BITS}
        for name, (layer, unit) in layers.items():
            shifts[name], units[name] = layer.shifts(), unit
            out[prefix + name] = layer.quantised().to(torch.int8)
        for name, bias in biases.items():
            integers = torch.floor(bias * torch.exp2(shifts[name] + units[name]) + 0.5)
            out[f"{prefix}{name}_bias"] = integers.clamp(-PRIOR_BIAS_MAX, PRIOR_BIAS_MAX).to(torch.int32)
            out[f"{prefix}{name}_shift"] = shifts[name].to(torch.uint8)
        if step.direct is not None:
            direct = torch.floor(step.direct * 2**DIRECT_BITS + 0.5).clamp(-127, 127)
            out[f"{prefix}direct"] = direct.to(torch.int8)
    check_prior_sums(out)
    for name, of_one in (("compand", 1.0), ("compand_half", 0.5)):
        out[name] = torch.floor(compand(torch.arange(float(COMPANDED)) * of_one) + 0.5).to(torch.uint8)
    return out


@torch.no_grad()
def restore_prior(prior: Prior, tensors: Tensors) -> None:
    """Give a prior the weights of a model file.

    Raises
    ------
    KeyError, RuntimeError, ValueError
        If the tensors do not fit the architecture.
    """
    for prefix, step, layers in _steps(prior):
        exponents = {name: -tensors[f"{prefix}{name}_shift"].double() for name in (*layers, "out")}
        for name, (layer, _) in layers.items():
            layer.weight.copy_(tensors[prefix + name] * torch.exp2(exponents[name])[:, None])
        _fit(step.out_bias, tensors[f"{prefix}out_bias"].double() * torch.exp2(exponents["out"] - HIDDEN_BITS))
        if layers:
            first, second = (tensors[f"{prefix}{name}_bias"].double() for name in ("first", "second"))
            _fit(step.first_bias, first * torch.exp2(exponents["first"] - INPUT_BITS))
            step.second_bias.copy_(second * torch.exp2(exponents["second"] - HIDDEN_BITS))
        if step.direct is not None:
            step.direct.copy_(tensors[f"{prefix}direct"].double() * 2.0**-DIRECT_BITS)


def _qualities(device: torch.device) -> Tensor:
    return torch.arange(1, QUALITIES + 1, dtype=torch.float32, device=device)


def _fit(table: QualityTable, values: Tensor) -> None:
    """Set the knots that come nearest to values (QUALITIES,C) at whole qualities."""
    knots, channels = table.table.shape
    if values.shape != (QUALITIES, channels):
        raise ValueError(f"expected a table over quality of shape ({QUALITIES}, {channels}), got {tuple(values.shape)}")
    probe = QualityTable(knots, knots)
    probe.table.copy_(torch.eye(knots))
    weights = probe(_qualities(torch.device("cpu"))).double()
    table.table.copy_(torch.linalg.lstsq(weights, values.double()).solution.float())
