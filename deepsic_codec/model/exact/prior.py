"""The prior as the format defines it: integers in, integers out.

Each step is a small perceptron over gathered neighbours: features (P,K) -> width -> width -> mean and scale index of
each channel. Gathering instead of convolving makes every layer one product of 8-bit integers, which is the same on any
backend (`matrix`, `docs/entropy-coder.md`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.exact.matrix import Matrix
from deepsic_codec.model.exact.prior_formats import (
    DIRECT_BITS,
    HIDDEN_BITS,
    HIDDEN_OFFSET,
    INPUT_BITS,
    SCALE_BITS,
)
from deepsic_codec.model.family import below
from deepsic_codec.model.likelihood import log_scales
from deepsic_codec.model.neighbours import Neighbours
from deepsic_codec.model.ops.protocol import Direct, Hidden, RateTables, StepTensors, SymbolState
from deepsic_codec.model.ops.select import ops_for
from deepsic_codec.model.schedule import Step, schedule


class IntegerPrior:
    """The `family.CodingPrior` of the tensors that `export.export_prior` writes."""

    def __init__(self, arch: Architecture, tensors: Mapping[str, Tensor], device: str = "cpu") -> None:
        self.steps = schedule(arch.prior_groups, arch.prior_detail)
        self.latents = arch.latents
        self.device = device
        self.ops = ops_for(device)
        parts = [below(tensors, str(i)) for i in range(len(self.steps))]
        self._tensors = [_step_tensors(part, device) for part in parts]
        #: Companded magnitudes of symbols, int8 (COMPANDED,), without a trellis and with one.
        self.companded = [tensors[name].to(device=device, dtype=torch.int8) for name in ("compand", "compand_half")]
        #: Logarithms of the scales that the indices were trained to mean; for estimates, not for decoding.
        self.log_scales = log_scales(device)

    def neighbours(self, symbols: Tensor, trellis: bool = False) -> Neighbours:
        flat = symbols.reshape(-1, symbols.shape[-1])
        features = self.ops.features(flat, self.companded[trellis], int(trellis))
        linear, magnitude = (t.view(symbols.shape) for t in features)
        return Neighbours(linear, magnitude, int(trellis))

    def no_neighbours(self, images: int, grid: tuple[int, int], trellis: bool = False) -> Neighbours:
        zeros = torch.zeros(images, *grid, self.latents, dtype=torch.int8, device=self.device)
        return Neighbours(zeros, zeros, int(trellis))

    def update(self, neighbours: Neighbours, step: Step, rows: Tensor, symbols: Tensor) -> None:
        self.ops.enter(neighbours, step, rows, symbols, self.companded[neighbours.halving])

    def move_symbols(
        self,
        state: SymbolState,
        step: Step,
        rows: tuple[Tensor, Tensor],
        predicted: tuple[Tensor, Tensor],
        tables: RateTables,
        quality: Tensor | int,
    ) -> None:
        self.ops.move_symbols(state, step, rows, predicted, tables, self.companded[0], quality)

    def run(self, number: int, neighbours: Neighbours, rows: Tensor, quality: Tensor | int) -> tuple[Tensor, Tensor]:
        return self.ops.predict(neighbours, self.steps[number], rows, self._tensors[number], quality)


def _step_tensors(part: Mapping[str, Tensor], device: str) -> StepTensors:
    """Tensors of a step as `Ops.predict` takes them, with the halves that round added to the biases."""
    ints = {k: v.to(device=device, dtype=torch.int32) for k, v in part.items()}
    out_bias, hidden, direct = ints["out_bias"], None, None
    # means in eighths: down by shift + HIDDEN_BITS - 3 bits; indices in quarters
    mean, index = ints["out_shift"].chunk(2)
    mean_shift, index_shift = mean + 1, index + (HIDDEN_BITS - SCALE_BITS - 2)
    if "first" in part:
        out_bias = out_bias + HIDDEN_OFFSET * ints["out"].sum(1, dtype=torch.int32)
        second_bias = ints["second_bias"] + HIDDEN_OFFSET * ints["second"].sum(1, dtype=torch.int32)
        first_shift, second_shift = ints["first_shift"] + (INPUT_BITS - HIDDEN_BITS), ints["second_shift"]
        hidden = Hidden(
            Matrix(part["first"], device),
            ints["first_bias"] + _half(first_shift) - (HIDDEN_OFFSET << first_shift),
            first_shift,
            Matrix(part["second"], device),
            second_bias + _half(second_shift) - (HIDDEN_OFFSET << second_shift),
            second_shift,
            Matrix(part["out"], device),
        )
    if "direct" in part:
        direct = Direct(ints["direct"], mean - (DIRECT_BITS - HIDDEN_BITS))
    out_bias = out_bias + torch.cat([_half(mean_shift), _half(index_shift)])
    return StepTensors(hidden, direct, out_bias, mean_shift, index_shift)


def _half(shift: Tensor) -> Tensor:
    """Addend with which a shift to the right rounds to nearest: 2^(shift - 1), or 0 for no shift."""
    return (1 << shift) >> 1
