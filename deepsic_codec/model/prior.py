"""The learned prior as it is trained: in floating point, imitating integers in its last phase.

`schedule` has the coding order and the order of inputs, `exact.prior` the integer form that codes symbols.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.exact.fixed import ste_round
from deepsic_codec.model.exact.prior_formats import (
    DIRECT_BITS,
    HIDDEN_BITS,
    HIDDEN_MAX,
    INPUT_BITS,
    LINEAR_MAX,
    SCALE_BITS,
    SHIFTS,
)
from deepsic_codec.model.likelihood import log_scales, logistic_bits, scale_of
from deepsic_codec.model.logistic import INDEX_LEVELS, MEAN_LEVELS, SCALES
from deepsic_codec.model.networks import QualityTable
from deepsic_codec.model.schedule import Step, schedule


def compand(symbols: Tensor) -> Tensor:
    """Magnitude feature 4 log2(1 + |q|); its rounded form is tabulated in the format."""
    return 4 * torch.log2(1 + symbols.abs())


def _feature_views(
    step: Step, sources: Sequence[Tensor], features: Tensor, height: int, width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views of one shape: of padded sources (N,h+2,w+2,C), and of features (N,P,K) grid by grid."""
    first = 0
    for grid in step.grids(height, width):
        at = features[:, first : first + grid.rows * grid.columns].unflatten(1, (grid.rows, grid.columns))
        first += grid.rows * grid.columns
        column = 0
        for part in step.inputs:
            for dy, dx in part.offsets:
                top, left = grid.y + dy + 1, grid.x + dx + 1
                rows, columns = (slice(k, k + 2 * n - 1, 2) for k, n in ((top, grid.rows), (left, grid.columns)))
                stop = column + part.stop - part.first
                yield sources[part.kind][:, rows, columns, part.first : part.stop], at[..., column:stop]
                column = stop


class _Features(torch.autograd.Function):
    """Features (N,P,K) of every step that has positions and inputs, in the order of `Step.inputs`.

    All steps in one function, so that the gradients that all steps have for a symbol are added up in one place.
    Positions are ordered grid by grid, which are read without an index.
    """

    @staticmethod
    def forward(ctx: Any, steps: Sequence[Step], linear: Tensor, magnitude: Tensor) -> tuple[Tensor, ...]:
        n, h, w, _ = ctx.shape = linear.shape
        ctx.steps = [s for s in steps if s.input_count and s.position_count(h, w)]
        sources = [F.pad(t, (0, 0, 1, 1, 1, 1)) for t in (magnitude, linear)]
        out = [linear.new_empty(n, s.position_count(h, w), s.input_count) for s in ctx.steps]
        for step, features in zip(ctx.steps, out, strict=True):
            for source, part in _feature_views(step, sources, features, h, w):
                part.copy_(source)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor, Tensor]:
        n, h, w, c = ctx.shape
        magnitude, linear = (slopes[0].new_zeros(n, h + 2, w + 2, c) for _ in range(2))
        for step, features in zip(ctx.steps, slopes, strict=True):
            for source, part in _feature_views(step, (magnitude, linear), features, h, w):
                source += part
        return None, linear[:, 1:-1, 1:-1], magnitude[:, 1:-1, 1:-1]


def _prediction_views(
    steps: Sequence[Step], predictions: Sequence[Tensor], whole: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views of one shape: of the predictions (N,P,count) of steps, and of all symbols (N,h,w,C)."""
    height, width = whole[0].shape[1:3]
    for number, step in enumerate(steps):
        first = 0
        for grid in step.grids(height, width):
            for part, target in zip(predictions[2 * number : 2 * number + 2], whole, strict=True):
                at = part[:, first : first + grid.rows * grid.columns].unflatten(1, (grid.rows, grid.columns))
                yield at, target[:, grid.y :: 2, grid.x :: 2, step.channels]
            first += grid.rows * grid.columns


class _Assembled(torch.autograd.Function):
    """Means and scale indices (N,h,w,C) of all symbols, from those (N,P,count) of each step in turn."""

    @staticmethod
    def forward(ctx: Any, steps: Sequence[Step], shape: Sequence[int], *predictions: Tensor) -> tuple[Tensor, Tensor]:
        ctx.steps, ctx.shape = [s for s in steps if s.position_count(*shape[1:3])], shape
        whole = predictions[0].new_empty(shape), predictions[0].new_empty(shape)
        for part, target in _prediction_views(ctx.steps, predictions, whole):
            target.copy_(part)
        return whole

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        n, h, w, _ = ctx.shape
        out = [slopes[0].new_empty(n, s.position_count(h, w), s.count) for s in ctx.steps for _ in range(2)]
        for part, source in _prediction_views(ctx.steps, out, slopes):
            part.copy_(source)
        return None, None, *out


class IntLinear(nn.Module):
    """Linear layer that can imitate int8 weights with a power-of-two scale per output."""

    def __init__(self, inputs: int, outputs: int, input_max: int, shift_range: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.input_max, self.shift_range = input_max, shift_range

    def shifts(self) -> Tensor:
        """Exponents k with |w| 2^k <= 127 and sum |w| 2^k input_max < 2^22, per output."""
        w = self.weight.detach().abs()
        bound = torch.minimum(127 / w.amax(1).clamp(min=1e-6), 2.0**22 / (w.sum(1) * self.input_max).clamp(min=1e-6))
        return torch.log2(bound).floor().clamp(*self.shift_range)

    def quantised(self) -> Tensor:
        """Integer weights, as float, with straight-through gradient."""
        return ste_round(self.weight * torch.exp2(self.shifts())[:, None]).clamp(-127, 127)

    def forward(self, x: Tensor, quantised: bool) -> Tensor:
        """(P,inputs) -> (P,outputs)."""
        if not quantised:
            return F.linear(x, self.weight)
        return F.linear(x, self.quantised() * torch.exp2(-self.shifts())[:, None])


class StepNetwork(nn.Module):
    """One step: perceptron from neighbours to means and scale indices of its channels."""

    def __init__(self, step: Step, width: int, knots: int) -> None:
        super().__init__()
        self.count = step.count
        self.direct_inputs = step.direct_inputs
        inputs = step.input_count
        self.has_inputs = inputs > 0
        if inputs:
            self.first = IntLinear(inputs, width, LINEAR_MAX, SHIFTS["first"])
            self.second = IntLinear(width, width, HIDDEN_MAX, SHIFTS["second"])
            self.out = IntLinear(width, 2 * self.count, HIDDEN_MAX, SHIFTS["out"])
            nn.init.zeros_(self.out.weight)
            self.first_bias = QualityTable(width, knots)
            self.second_bias = nn.Parameter(torch.zeros(width))
        #: Weights (neighbours, count) of the group's own signed neighbours in the mean, if they are known.
        self.direct: nn.Parameter | None = None
        if step.signed:
            self.direct = nn.Parameter(torch.zeros(len(step.offsets), self.count))
        self.out_bias = QualityTable(2 * self.count, knots)

    def forward(self, x: Tensor | None, quality: Tensor, quantised: bool) -> tuple[Tensor, Tensor]:
        """Features (N,P,K) of the positions of a step -> means and scale indices (N,P,count), or (N,1,count)."""
        out = self.out_bias(quality)[:, None]
        if x is not None:
            h = F.relu(self.first(x, quantised) + self.first_bias(quality)[:, None])
            h = _requantise(h) if quantised else h
            h = F.relu(self.second(h, quantised) + self.second_bias)
            h = _requantise(h) if quantised else h
            out = out + self.out(h, quantised)
        mean, index = out[..., : self.count], out[..., self.count :] * 2**SCALE_BITS + SCALES / 2
        if x is not None and self.direct is not None:
            d = ste_round(self.direct * 2**DIRECT_BITS) / 2**DIRECT_BITS if quantised else self.direct
            signed = x[..., self.direct_inputs].unflatten(-1, self.direct.shape)
            mean = mean + (signed * 2**INPUT_BITS * d).sum(-2)
        if quantised:
            mean, index = ste_round(mean * MEAN_LEVELS) / MEAN_LEVELS, ste_round(index * INDEX_LEVELS) / INDEX_LEVELS
        return mean, index.clamp(0, SCALES - 1)


def _requantise(h: Tensor) -> Tensor:
    return (ste_round(h * 2**HIDDEN_BITS) / 2**HIDDEN_BITS).clamp(max=HIDDEN_MAX / 2**HIDDEN_BITS)


class Prior(nn.Module):
    """The networks of all steps; they imitate integers where `quantised` says so."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.steps = schedule(arch.prior_groups, arch.prior_detail)
        self.networks = nn.ModuleList(StepNetwork(step, arch.prior_width, arch.knots) for step in self.steps)
        self.register_buffer("log_scales", log_scales(), persistent=False)
        self.log_scales: Tensor

    def forward(
        self, symbols: Tensor, quality: Tensor, quantised: bool = False, trellis: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Symbols (N,C,h,w) as float -> mean and scale index of each, same shape.

        `trellis` bool (N,) tells which images have symbols in half steps.
        """
        features = self.features(symbols.permute(0, 2, 3, 1), quantised, trellis)
        mean, index = self.predict(*features, quality, quantised)
        return mean.permute(0, 3, 1, 2), index.permute(0, 3, 1, 2)

    def features(
        self, symbols: Tensor, quantised: bool = False, trellis: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Symbols (N,h,w,C) as float -> the features of each, linear and magnitude, same shape."""
        numbers = symbols
        if trellis is not None:
            symbols = torch.where(trellis[:, None, None, None], symbols / 2, symbols)
            numbers = torch.sign(symbols) * symbols.abs().ceil()
        magnitude = compand(symbols)
        unit = 2.0**-INPUT_BITS
        linear = numbers.clamp(-LINEAR_MAX, LINEAR_MAX) * unit
        return linear, (ste_round(magnitude) if quantised else magnitude) * unit

    def predict(
        self, linear: Tensor, magnitude: Tensor, quality: Tensor, quantised: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Features (N,h,w,C) of all symbols -> mean and scale index of each, same shape."""
        shape, kind = linear.shape, linear.device.type
        if quantised and torch.is_autocast_enabled(kind):  # integers have to be exact
            with torch.autocast(kind, enabled=False):
                return self.predict(linear, magnitude, quality, quantised)
        if torch.is_autocast_enabled(kind):  # bfloat16 has bits enough for symbols up to 256
            linear, magnitude = (t.to(torch.get_autocast_dtype(kind)) for t in (linear, magnitude))
        features = iter(_Features.apply(self.steps, linear, magnitude))  # type: ignore[no-untyped-call]
        predictions: list[Tensor] = []
        for net, step in zip(self.networks, self.steps, strict=True):
            if count := step.position_count(*shape[1:3]):
                x = next(features) if net.has_inputs else None
                predictions += [t.expand(-1, count, -1) for t in net(x, quality, quantised)]
        mean, index = _Assembled.apply(self.steps, shape, *predictions)  # type: ignore[no-untyped-call]
        return mean, index

    def bits(self, values: Tensor, mean: Tensor, index: Tensor) -> Tensor:
        """-log2 of the logistic mass in unit bins around ``values``; same shape."""
        return logistic_bits((values - mean).abs(), scale_of(index, self.log_scales))

    def symbol_bits(self, symbols: Tensor, quality: Tensor, trellis: Tensor, odd: Tensor) -> Tensor:
        """Return the bits of symbols (N,C,h,w) as payloads have them; same shape.

        Parameters
        ----------
        symbols : Tensor (N,C,h,w)
            As float.
        quality : Tensor (N,)
        trellis : Tensor (N,)
            Which images have symbols in half steps.
        odd : Tensor (N,C,h,w)
            Which of these are of odd states of the trellis.
        """
        mean, index = self(symbols, quality, True, trellis)
        centre = torch.where(trellis[:, None, None, None], symbols / 2, symbols)
        # in odd states, the bins of 0 and of the odd halves beside it meet in the middle
        magnitude = centre.abs()
        near = odd & (magnitude < 1)
        width = torch.where(near, torch.where(magnitude == 0, 0.5, 0.75), 1.0)
        centre = torch.where(near, centre * 1.25, centre)
        return logistic_bits((centre - mean).abs() / width, scale_of(index, self.log_scales) / width)
