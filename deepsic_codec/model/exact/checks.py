"""Checks of a stored model that take several tensors together: whether all sums of products are exact."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.prior_formats import HIDDEN_MAX, LINEAR_MAX
from deepsic_codec.model.family import ANALYSIS, HEAD, PRIOR, SYNTHESIS, below
from deepsic_codec.model.file import Arrays


def check_model_sums(arch: Architecture, arrays: Arrays) -> None:
    """Raise ValueError unless all sums of products of all networks of a model file are exact."""
    networks = (
        (ANALYSIS, arch.analysis, formats.ANALYSIS_LAYERS),
        (SYNTHESIS, arch.synthesis, formats.SYNTHESIS_LAYERS),
        (HEAD, arch.head, formats.HEAD_LAYERS),
    )
    for prefix, sizes, layers in networks:
        forms = {name: layers[name] for name in sizes.layers}
        for name, blocks in sizes.blocks.items():
            for number in range(blocks.number):
                forms |= {f"{name}.{number}.{part}": form for part, form in formats.BLOCK_LAYERS.items()}
        for name, form in forms.items():
            at = f"{prefix}.{name}"
            check_sums(at, arrays[f"{at}.weight"], arrays[f"{at}.bias"], arrays[f"{at}.shift"], form)
    for name, form in formats.FILTER_LAYERS.items():
        at = f"{SYNTHESIS}.{name}"
        bias = arrays[f"{at}.bias"].astype(np.int64)
        if name == "filter_up":
            places = arrays[f"{at}.places"].astype(np.int64).reshape(bias.shape[1], -1)
            bias = np.abs(bias) + np.abs(places).max(1)
        check_sums(at, arrays[f"{at}.weight"], bias, arrays[f"{at}.shift"], form)
    check_prior_sums(below(arrays, PRIOR))


def check_sums(name: str, weight: ArrayLike, bias: ArrayLike, shift: ArrayLike, form: formats.Format) -> None:
    """Raise ValueError if the sums of a stored layer could be inexact, or its integers are out of range."""
    weights, biases, shifts = (np.asarray(values, np.int64) for values in (weight, bias, shift))
    flat, both = weights.reshape(len(weights), -1), form.wide_input and form.wide_weight
    parts = [flat]
    if form.wide_weight:
        high = (flat + formats.DIGIT // 2) >> 7
        parts = [high, flat - (high << 7)]
    largest = formats.DIGIT if form.wide_input else form.in_max
    sums = np.stack([np.abs(part).sum(1) for part in parts])
    sums = (sums.sum(0) if form.wide_input else sums.max(0)) * largest
    # wide layers add their bias to sums that are assembled in 32 bits
    if not (form.wide_input or form.wide_weight):
        sums = sums + np.abs(biases).reshape(-1, len(flat)).max(0)
    lowest_shift, highest_shift = (8, 31) if both else (0, 24)
    valid = sums.max() < (2**20 if form.spatial else 2**24) and np.abs(flat).max() <= form.weight_max
    valid = valid and np.abs(biases).max() < 2**27
    valid = valid and lowest_shift <= shifts.min() and shifts.max() <= highest_shift
    shapes: list[tuple[int, ...]] = [flat.shape[:1]]
    if form in (formats.UP, formats.FILTER_UP):
        shapes.append((formats.QUALITIES, len(flat)))
    if not valid or biases.shape not in shapes or shifts.shape != flat.shape[:1]:
        raise ValueError(f"{name}: weights, biases or shifts are out of the range in which sums are exact")


def check_prior_sums(tensors: Mapping[str, ArrayLike]) -> None:
    """Raise ValueError unless all sums of products of a prior, biases included, stay below 2^23."""
    for bias_name, values in tensors.items():
        if bias_name.endswith("_bias"):
            name, bias = bias_name.removesuffix("_bias"), np.asarray(values, np.int64)
            total = np.abs(bias).reshape(-1, bias.shape[-1]).max(0)
            if name in tensors:  # not in a step without inputs
                largest = LINEAR_MAX if name.endswith(".first") else HIDDEN_MAX
                total = total + np.abs(np.asarray(tensors[name], np.int64)).sum(1) * largest
            if total.max() >= 2**23:
                raise ValueError(
                    f"prior: weights or biases of {name} are too large for exact sums; train with a lower learning rate"
                )
