"""Operations on integers, and the tensors that they take.

All implementations give the same integers. Streams are integers in float32 within +-STREAM_MAX, in units of
2^-STREAM_BITS (`exact.formats`); sums of products are int32. N counts images, P rows (positions), C channels.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from deepsic_codec.model.exact.matrix import Matrix
from deepsic_codec.model.neighbours import Neighbours
from deepsic_codec.model.schedule import Step


class Sums(NamedTuple):
    """Sums of products int32 (P,C), and the bias and shift (C,) that turn them into integers of a format."""

    total: Tensor
    bias: Tensor
    shift: Tensor


class BlockTensors(NamedTuple):
    """Tensors of a residual block of C channels.

    Attributes
    ----------
    weight, taps : Tensor
        Of the 3x3 convolution by channel, float32 (C,1,3,3), and the same as (9,C).
    spatial_bias : Tensor
        float32 (C,), in units of the convolution's result.
    up, down : Matrix
        int8 (hidden,C) and (C,hidden).
    up_bias, up_shift, down_bias, down_shift : Tensor
        int32 (hidden,) and (C,); `up_bias` may have a row for each whole quality.
    bounds : (int, int)
        Range of hidden values.
    """

    weight: Tensor
    taps: Tensor
    spatial_bias: Tensor
    up: Matrix
    up_bias: Tensor
    up_shift: Tensor
    down: Matrix
    down_bias: Tensor
    down_shift: Tensor
    bounds: tuple[int, int]


class Hidden(NamedTuple):
    """The layers of a step of the prior between its features and its outputs.

    Matrices are int8 (outputs,inputs), all else int32; `first_bias` has a row for each whole quality.
    """

    first: Matrix
    first_bias: Tensor
    first_shift: Tensor
    second: Matrix
    second_bias: Tensor
    second_shift: Tensor
    out: Matrix


class Direct(NamedTuple):
    """Weights int32 (neighbours,count) of a step's direct prediction of means, and its shifts (count,)."""

    weight: Tensor
    shift: Tensor


class StepTensors(NamedTuple):
    """Tensors of a step of the prior; None where it has no such layers.

    `out_bias` is int32 (qualities, 2 count), with means before scale indices; the shifts are (count,).
    """

    hidden: Hidden | None
    direct: Direct | None
    out_bias: Tensor
    mean_shift: Tensor
    index_shift: Tensor


class SymbolState(NamedTuple):
    """Latents in quantiser steps, float32 (P,C); their symbols, int32 (P,C), and features, both changed in place."""

    latents: Tensor
    symbols: Tensor
    neighbours: Neighbours


class RateTables(NamedTuple):
    """Saving and price of a moved symbol, int32, in 2^-RATE_BITS bits.

    `saved` (scale indices, distances) has the bits that a step towards the mean saves, and `price` (100,C) the bits
    that the squared error of one quantiser step is worth, for each whole quality.
    """

    saved: Tensor
    price: Tensor


class Ops(Protocol):
    """Operations on integers on one kind of device."""

    def narrow(self, total: Tensor, bias: Tensor, shift: Tensor, low: int, high: int) -> Tensor:
        """Sums int32 (P,C) -> `clamp((sum + bias) >> shift, low, high)`, int8 (P,C).

        Biases are (C,), or (B,C) with P / B rows for each; shifts (C,). `total` may be changed.
        """

    def add(self, stream: Tensor, total: Tensor, bias: Tensor, shift: Tensor) -> None:
        """Add `(sum + bias) >> shift` of sums (P,C) to a stream (P,C) in place, and clip it."""

    def read(self, values: Tensor, bits: int) -> Tensor:
        """Integers in float32 (P,C) -> int8 in units of 2^bits, rounded to nearest; with 0 bits rounded down."""

    def modulate(self, total: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """Sums (P,C) -> a stream: `(clamp((sum + bias) >> shift) scale + offset) >> MODULATION_BITS`.

        The clamp is to +-STEM_MAX. Scales and offsets are (N,C), integers in float32.
        """

    def blocks(self, stream: Tensor, blocks: list[BlockTensors], quality: Tensor) -> Tensor:
        """Residual blocks, one after another: 3x3 by channel, C -> hidden -> C, and the sum.

        `stream` (N,h,w,C) may be changed; whole qualities are int64 (N,).
        """

    def features(self, symbols: Tensor, companded: Tensor, halving: int) -> tuple[Tensor, Tensor]:
        """Symbols (P,C) -> their numbers clipped to +-LINEAR_MAX, and companded magnitudes, int8 (P,C) each.

        `companded` is int8 (32769,). With a trellis, `halving` is 1 and numbers are halves of the symbols, rounded away
        from 0; without, they are the symbols.
        """

    def enter(self, neighbours: Neighbours, step: Step, rows: Tensor, symbols: Tensor, companded: Tensor) -> None:
        """Enter the features of symbols (P,count) of a step at its padded rows (P,), in place."""

    def predict(
        self, neighbours: Neighbours, step: Step, rows: Tensor, tensors: StepTensors, quality: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """Means int16 and scale indices uint8, (P,count), of the symbols of a step.

        `rows` are the step's padded rows, int64 (P,); whole qualities are int64 (P,), or one for all rows.
        """

    def move_symbols(
        self,
        state: SymbolState,
        step: Step,
        rows: tuple[Tensor, Tensor],
        predicted: tuple[Tensor, Tensor],
        tables: RateTables,
        companded: Tensor,
        quality: Tensor | int,
    ) -> None:
        """Move symbols of a step towards their means where the bits that this saves outweigh the error, in place.

        `rows` are padded and plain rows, int64 (P,) each; `predicted` and `quality` are as in `predict`.
        """

    def dequantise(self, symbols: Tensor, steps: Tensor) -> Tensor:
        """Symbols (P,C) and dequantiser steps int32 (N,C) -> latents int32 (P,C) within +-WIDE_MAX."""

    def digits(self, values: Tensor, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Integers int32 (P,C) within +-WIDE_MAX -> high and low digits to the base 128, int8.

        They are first multiplied by powers of two `unit`, float32 (C,), if given, then rounded and clipped.
        """

    def companded_digits(self, values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Digits of integers int32 (P,C) whose magnitudes are replaced by the entries of a table."""

    def pixels(self, linear: Sums, rest: Sums, grid: tuple[int, int, int]) -> Tensor:
        """Images int16 (n,16h,16w,3) in 64ths of a grey level from both branches of a synthesis; `grid` is (n, h, w).

        `linear` are sums (n h w,768) of blocks of 16x16 pixels, `rest` sums (n 2h 2w,192) of blocks of 8x8 pixels, both
        with channels in the order (y,x,colour). Pixels are 0..16320.
        """
