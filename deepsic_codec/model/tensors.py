"""Tables of the tensors that a model file has: name, shape, dtype and range of each, and what its numbers cost.

Each family has one such table (`family.Family.tensors`). A model file is compared with it before anything is computed,
because compiled loops check no bounds: they trust the shapes, indices and shifts that a file brings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from deepsic_codec import config
from deepsic_codec.errors import ModelMismatch
from deepsic_codec.model.file import Arrays
from deepsic_codec.payload.coders.contexts import (
    INDICES,
    INPUTS,
    MAX_CONFIDENCE,
    MAX_LOW_BITS,
    MAX_RATE,
    MIXERS,
    SCALES,
    ContextLayout,
)

#: Numbers that floating-point networks may hold: half precision has no larger ones.
HALF = ("float16", "float32")
HALF_MAX = 65504.0
#: Mixer weights in 1/65536: far above trained ones, and far below what overflows on any device.
MAX_WEIGHT = 1 << 24
#: Bytes of an activation while a layer computes: 8-bit input, 32-bit sums, and the result in 32 bits.
ACTIVATION_BYTES = 9


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a model file has to be.

    Attributes
    ----------
    shape : tuple of int
    dtypes : tuple of str
        Names of the NumPy dtypes that are allowed.
    low, high : float
        Range of its values.
    uses : float
        How often each of its numbers is multiplied for a pixel, 0 for numbers that are not multiplied.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    low: float
    high: float
    uses: float = 0.0


Table = dict[str, TensorSpec]


def spec(dtype: str, shape: tuple[int, ...], low: float, high: float, uses: float = 0.0) -> TensorSpec:
    """Return the description of a tensor of one dtype."""
    return TensorSpec(shape, (dtype,), low, high, uses)


def half(shape: tuple[int, ...], uses: float = 0.0, low: float = -HALF_MAX) -> TensorSpec:
    """Return the description of a tensor of a floating-point network."""
    return TensorSpec(shape, HALF, low, HALF_MAX, uses)


def coder_tensors(latents: int) -> Table:
    """Return the tensors of the entropy coder's tables (`CoderTables`)."""
    size = (ContextLayout.of(latents).size,)
    return {
        "decoder.coder.probabilities": spec("uint16", size, 0, 65535),
        "decoder.coder.confidence": spec("uint16", size, 0, MAX_CONFIDENCE),
        "decoder.coder.weights": spec("int32", (MIXERS, INPUTS), -MAX_WEIGHT, MAX_WEIGHT),
        "decoder.coder.low_bits": spec("uint8", (SCALES,), 0, MAX_LOW_BITS),
        "decoder.coder.levels": spec("uint8", (INDICES,), 0, SCALES - 1),
        "decoder.coder.limit": spec("int64", (), 1, MAX_CONFIDENCE),
        "decoder.coder.rate": spec("int64", (), 0, MAX_RATE),
        "decoder.coder.single": spec("int64", (), 0, SCALES),
    }


def check_tensors(arrays: Arrays, table: Mapping[str, TensorSpec], subject: str) -> None:
    """Compare the arrays of a model file with the table of its architecture.

    Raises
    ------
    ModelMismatch
        If a tensor is missing, is none of the table, or has another shape or dtype or a value out of range, or if the
        architecture costs more than the settings allow. The message names the tensor.
    """
    macs, memory = cost(table)
    for setting, value, unit in (
        ("max_model_macs", macs, "multiplications"),
        ("max_model_memory", memory, "bytes of memory"),
    ):
        limit = getattr(config.get(), setting)
        if value > limit:
            raise ModelMismatch(
                f"{subject}: the networks take {value:.0f} {unit} a pixel, more than the limit of {limit}; if you "
                f"trust the model, raise the limit with deepsic_codec.config.set({setting}=...)"
            )
    mismatch = f"{subject}: tensors do not fit the architecture"
    for kind, names in (("is missing", table.keys() - arrays.keys()), ("is unknown", arrays.keys() - table.keys())):
        if names:
            raise ModelMismatch(f"{mismatch}: {min(names)} {kind}")
    for name, array in arrays.items():
        expected = table[name]
        if array.shape != expected.shape or array.dtype.name not in expected.dtypes:
            raise ModelMismatch(
                f"{mismatch}: {name} is {array.dtype} {array.shape}, expected {' or '.join(expected.dtypes)} "
                f"{expected.shape}"
            )
        if array.size and not _within(array, expected.low, expected.high):
            raise ModelMismatch(f"{mismatch}: {name} has values outside {expected.low:g} to {expected.high:g}")


def cost(table: Mapping[str, TensorSpec]) -> tuple[float, float]:
    """Return multiplications for a pixel, and bytes of memory for a pixel that the widest layer takes."""
    macs = sum(prod(one.shape) * one.uses for one in table.values())
    widest = max((sum(one.shape[:2]) * one.uses for one in table.values()), default=0.0)
    return macs, ACTIVATION_BYTES * widest


def _within(array: np.ndarray[Any, Any], low: float, high: float) -> bool:
    # NaN is in no range
    return bool(array.min() >= low) and bool(array.max() <= high)
