"""Checks of a stored model that take several tensors together: whether all sums of products are exact."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.prior_formats import HIDDEN_MAX, LINEAR_MAX


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
    shapes = [flat.shape[:1], (formats.QUALITIES, len(flat))] if form is formats.UP else [flat.shape[:1]]
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
