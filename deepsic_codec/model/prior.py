"""The learned prior: mean and scale index of every symbol, in a few parallel passes.

Channels are split into groups coded one after another, and the positions of each group
into spatial passes, so that every pass sees all symbols of earlier groups on all sides
and, in later passes, neighbours of its own group::

    group 0, three passes      later groups, two passes
        A C A C                    1 2 1 2
        C B C B                    2 1 2 1
        A C A C                    1 2 1 2

Each pass is a small perceptron over gathered neighbours: features (P,K) -> width -> width
-> mean and scale index of each channel.  Gathering instead of convolving makes every layer
one product of 8-bit integers, which is the same on any backend (``exact.py``,
``docs/entropy-coder.md``).  :class:`Prior` is what is trained;
:class:`IntegerPrior` is what the format uses, and computes with integers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from deepsic_codec.model.device import synchronize
from deepsic_codec.model.exact.matrix import Matrix
from deepsic_codec.model.networks import Architecture, QualityTable
from deepsic_codec.model.ops.select import fused_on, passes_on
from deepsic_codec.model.ops.tensor_ops import Contexts, PassTensors

#: Range of the real-valued scale index; levels of the mean per unit.
SCALES = 64
MEAN_LEVELS = 8
#: The integer prior gives the scale index in quarters.
INDEX_LEVELS = 4
INDEX_MAX = (SCALES - 1) * INDEX_LEVELS
#: Input features: symbols clipped to +-LINEAR_MAX, and companded magnitudes.
LINEAR_MAX = 127
#: Input features are integers in units of 2^-INPUT_BITS, hidden ones 2^-HIDDEN_BITS.
INPUT_BITS, HIDDEN_BITS = 3, 4
HIDDEN_MAX = 255
#: Hidden features less this have 8 bits and a sign.
HIDDEN_OFFSET = 128
#: Last layer: scale index = 32 + 2^SCALE_BITS o, mean = o.
SCALE_BITS = 3
#: Weights of the direct prediction are integers in units of 2^-DIRECT_BITS.
DIRECT_BITS = 6
MEAN_MAX = 32767
#: Widths for which there is a kernel of a whole pass.
FUSED_WIDTHS = (32, 64, 128)

Offsets = tuple[tuple[int, int], ...]
#: Means in eighths (P,count) int16 and scale indices in quarters (P,count) uint8 of every pass that has positions.
Predictions = list[tuple[Tensor, Tensor]]
CROSS: Offsets = ((0, -1), (0, 1), (-1, 0), (1, 0))
DIAGONAL: Offsets = ((-1, -1), (-1, 1), (1, -1), (1, 1))
CENTRE: Offsets = ((0, 0),)


@dataclass(frozen=True)
class Pass:
    """One step of the coding order: channels, positions and known neighbours of its own group.

    ``detail`` is the number of leading channels that are seen with their signs and diagonally.
    """

    start: int
    count: int
    mask: str
    offsets: Offsets
    detail: int

    @property
    def second(self) -> bool:
        """Whether neighbours of the same group are known."""
        return bool(self.offsets)

    @property
    def signed(self) -> bool:
        """Whether they are known with their signs."""
        return self.second and self.start < self.detail

    def positions(self, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and columns of the symbols of this pass, in coding order."""
        y, x = np.mgrid[:height, :width]
        odd = (y + x) % 2 == 1
        masks = {"A": ~odd & (y % 2 == 0), "B": ~odd & (y % 2 == 1), "C": odd, "1": ~odd, "2": odd}
        ys, xs = np.nonzero(masks[self.mask])
        return ys.astype(np.int64), xs.astype(np.int64)


def schedule(groups: Sequence[int], detail: int) -> list[Pass]:
    """All passes in coding order, with contexts that see ``detail`` leading channels in detail."""
    out: list[Pass] = []
    start = 0
    for i, count in enumerate(groups):
        steps = (("A", ()), ("B", DIAGONAL), ("C", CROSS)) if i == 0 else (("1", ()), ("2", CROSS))
        out += [Pass(start, count, mask, offsets, detail) for mask, offsets in steps]
        start += count
    return out


@cache
def _scale_table() -> NDArray[np.float64]:
    """Logarithms of logistic scales whose discretised entropies grow geometrically, 0.004 to 9 bits."""
    grid = np.exp(np.linspace(np.log(0.02), np.log(200.0), 4000))
    entropies = []
    for s in grid:
        k = np.arange(int(40 * s) + 4)
        p = 0.5 * (np.tanh((k + 0.5) / (2 * s)) - np.tanh((k - 0.5) / (2 * s)))
        p = np.maximum(p, 1e-300)
        h = -p * np.log2(p)
        entropies.append(h[0] + 2 * h[1:].sum())
    wanted = np.exp(np.linspace(np.log(0.004), np.log(9.0), SCALES))
    return np.interp(np.log(wanted), np.log(np.array(entropies)), np.log(grid))


def scale_of(index: Tensor, table: Tensor) -> Tensor:
    """Logistic scale of a real-valued index in [0, SCALES - 1]."""
    index = index.clamp(0, SCALES - 1)
    low = index.detach().floor().clamp(0, SCALES - 2)
    base = table[low.long()]
    return torch.exp(base + (table[low.long() + 1] - base) * (index - low))


def ste_round(x: Tensor) -> Tensor:
    """Round to nearest with the identity as gradient."""
    return x + (torch.floor(x + 0.5) - x).detach()


def compand(symbols: Tensor) -> Tensor:
    """Magnitude feature 4 log2(1 + |q|); its rounded form is tabulated in the format."""
    return 4 * torch.log2(1 + symbols.abs())


class Neighbours:
    """Features of the symbols (B,h,w,C) of a batch, gathered pass by pass.

    ``linear`` and ``magnitude`` are (B (h+2) (w+2), C) with a border of zeros, and parts of ``both``.
    """

    def __init__(self, linear: Tensor, magnitude: Tensor) -> None:
        self.shape = b, h, w, c = linear.shape
        both = linear.new_zeros(2, b, h + 2, w + 2, c)
        for kind, values in enumerate((magnitude, linear)):
            both[kind, :, 1:-1, 1:-1] = values
        self.both = both.view(2, -1, c)
        self.magnitude, self.linear = self.both

    def rows(self, step: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Padded rows (P,), unpadded rows (P,) and image numbers (P,) of a pass."""
        return _rows(step, *self.shape[:3], self.linear.device, torch.is_inference_mode_enabled())

    def gather(self, step: Pass, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Features (P,K) and own linear neighbours (P,n,count); None where there are none."""
        own = slice(step.start, step.start + step.count)

        def take(source: Tensor, offsets: Offsets, channels: slice) -> Tensor:
            there = rows[:, None] + _row_offsets(offsets, self.shape[2] + 2, rows.device)
            found = source[:, channels].index_select(0, there.view(-1))
            return found.view(len(rows), -1)

        parts = [take(self.magnitude, step.offsets, own)] if step.second else []
        direct = None
        if step.signed:
            parts.append(take(self.linear, step.offsets, own))
            direct = parts[-1].view(len(rows), len(step.offsets), step.count)
        if step.start:
            known, near = slice(0, step.start), slice(0, min(step.start, step.detail))
            parts += [take(self.magnitude, CENTRE + CROSS, known), take(self.magnitude, DIAGONAL, near)]
            parts.append(take(self.linear, CENTRE + CROSS, near))
        return torch.cat(parts, 1) if parts else None, direct


@lru_cache(maxsize=64)
def _row_offsets(offsets: Offsets, pitch: int, device: torch.device) -> Tensor:
    """From a padded row to those at the offsets."""
    with torch.inference_mode(False):
        found = torch.tensor([dy * pitch + dx for dy, dx in offsets]).to(device)
    synchronize(device)
    return found


@lru_cache(maxsize=72)
def _rows(step: Pass, b: int, h: int, w: int, device: torch.device, inference: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`Neighbours.rows`; kept, since making them anew stops a GPU 18 times in a training step.

    ``inference`` keeps tensors made in inference mode, which autograd refuses, apart.
    """
    ys, xs = (torch.as_tensor(v, device=device) for v in step.positions(h, w))
    image = torch.arange(b, device=device)[:, None]
    padded = image * ((h + 2) * (w + 2)) + (ys + 1) * (w + 2) + xs + 1
    flat = image * (h * w) + ys * w + xs
    found = padded.reshape(-1), flat.reshape(-1), image.expand(b, len(ys)).reshape(-1)
    synchronize(device)
    return found


def input_count(step: Pass) -> int:
    """Number K of features of a pass."""
    near, around = min(step.start, step.detail), len(CENTRE + CROSS)
    own = step.count * len(step.offsets) * (2 if step.signed else 1)
    return own + step.start * around + near * (len(DIAGONAL) + around)


def input_names(step: Pass) -> list[tuple[str, int, int, int]]:
    """Kind, dy, dx and channel of each of them, in their order."""
    own = range(step.start, step.start + step.count)
    known, near = range(step.start), range(min(step.start, step.detail))
    parts = [("magnitude", step.offsets, own), ("linear", step.offsets if step.signed else (), own)]
    parts += [("magnitude", CENTRE + CROSS, known), ("magnitude", DIAGONAL, near), ("linear", CENTRE + CROSS, near)]
    return [(kind, *offset, channel) for kind, offsets, which in parts for offset in offsets for channel in which]


def _grids(mask: str, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Every second row and column: first row, first column, and how many there are, of the positions of a mask."""
    starts = {"A": [(0, 0)], "B": [(1, 1)], "C": [(0, 1), (1, 0)], "1": [(0, 0), (1, 1)], "2": [(0, 1), (1, 0)]}
    return [(y, x, (height - y + 1) // 2, (width - x + 1) // 2) for y, x in starts[mask]]


def _count(step: Pass, shape: Sequence[int]) -> int:
    """Number of positions of a pass in each image (B,h,w,C)."""
    return sum(rows * columns for _, _, rows, columns in _grids(step.mask, shape[1], shape[2]))


def _pieces(step: Pass) -> list[tuple[int, int, int, int, int]]:
    """Kind (0: magnitude, 1: linear), dy, dx, first and last channel of what :func:`input_names` names."""
    end, near = step.start + step.count, min(step.start, step.detail)
    parts = [(0, step.offsets, step.start, end), (1, step.offsets if step.signed else (), step.start, end)]
    parts += [(0, CENTRE + CROSS, 0, step.start), (0, DIAGONAL, 0, near), (1, CENTRE + CROSS, 0, near)]
    return [(kind, *at, low, high) for kind, offsets, low, high in parts for at in offsets if high > low]


def _views(
    step: Pass, sources: Sequence[Tensor], features: Tensor, height: int, width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of padded sources (B,h+2,w+2,C) and of features (B,P,K), pair by pair of the same shape."""
    first = 0
    for y, x, rows, columns in _grids(step.mask, height, width):
        grid = features[:, first : first + rows * columns].unflatten(1, (rows, columns))
        first += rows * columns
        at = 0
        for kind, dy, dx, low, high in _pieces(step):
            top, left = y + dy + 1, x + dx + 1
            part = sources[kind][:, top : top + 2 * rows - 1 : 2, left : left + 2 * columns - 1 : 2, low:high]
            yield part, grid[..., at : at + high - low]
            at += high - low


class _Contexts(torch.autograd.Function):
    """Features (B,P,K) of every pass that has positions and inputs, in the order of :func:`input_names`.

    All at once, so that the way back adds up what all passes want of a symbol in one place.
    Positions come grid by grid of :func:`_grids`, which are read without an index.
    """

    @staticmethod
    def forward(ctx: Any, steps: Sequence[Pass], linear: Tensor, magnitude: Tensor) -> tuple[Tensor, ...]:
        b, h, w, _ = ctx.shape = linear.shape
        ctx.steps = [s for s in steps if input_count(s) and _count(s, linear.shape)]
        sources = [F.pad(t, (0, 0, 1, 1, 1, 1)) for t in (magnitude, linear)]
        out = [linear.new_empty(b, _count(s, linear.shape), input_count(s)) for s in ctx.steps]
        for step, features in zip(ctx.steps, out, strict=True):
            for source, part in _views(step, sources, features, h, w):
                part.copy_(source)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor, Tensor]:
        b, h, w, c = ctx.shape
        magnitude, linear = (slopes[0].new_zeros(b, h + 2, w + 2, c) for _ in range(2))
        for step, features in zip(ctx.steps, slopes, strict=True):
            for source, part in _views(step, (magnitude, linear), features, h, w):
                source += part
        return None, linear[:, 1:-1, 1:-1], magnitude[:, 1:-1, 1:-1]


class _Places(torch.autograd.Function):
    """Means and scale indices (B,P,own) of all passes, brought to their places in (B,h,w,C) twice."""

    @staticmethod
    def forward(ctx: Any, steps: Sequence[Pass], shape: Sequence[int], *found: Tensor) -> tuple[Tensor, Tensor]:
        ctx.steps, ctx.shape = [s for s in steps if _count(s, shape)], shape
        whole = found[0].new_empty(shape), found[0].new_empty(shape)
        for part, place in _Places.pairs(ctx.steps, found, whole):
            place.copy_(part)
        return whole

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        b = ctx.shape[0]
        out = [slopes[0].new_empty(b, _count(s, ctx.shape), s.count) for s in ctx.steps for _ in range(2)]
        for part, place in _Places.pairs(ctx.steps, out, slopes):
            part.copy_(place)
        return None, None, *out

    @staticmethod
    def pairs(
        steps: Sequence[Pass], found: Sequence[Tensor], whole: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of what passes found and of where it belongs."""
        height, width = whole[0].shape[1:3]
        for number, step in enumerate(steps):
            first, own = 0, slice(step.start, step.start + step.count)
            for y, x, rows, columns in _grids(step.mask, height, width):
                for part, place in zip(found[2 * number : 2 * number + 2], whole, strict=True):
                    grid = part[:, first : first + rows * columns].unflatten(1, (rows, columns))
                    yield grid, place[:, y::2, x::2, own]
                first += rows * columns


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


class PriorPass(nn.Module):
    """One pass: perceptron from neighbours to means and scale indices of its channels."""

    def __init__(self, step: Pass, width: int, knots: int) -> None:
        super().__init__()
        self.own = step.count
        inputs = input_count(step)
        self.has_inputs = inputs > 0
        if inputs:
            self.first = IntLinear(inputs, width, LINEAR_MAX, (1, 14))
            self.second = IntLinear(width, width, HIDDEN_MAX, (1, 14))
            self.out = IntLinear(width, 2 * self.own, HIDDEN_MAX, (2, 8))
            nn.init.zeros_(self.out.weight)
            self.first_bias = QualityTable(width, knots)
            self.second_bias = nn.Parameter(torch.zeros(width))
        if step.signed:
            self.direct = nn.Parameter(torch.zeros(len(step.offsets), self.own))
        self.out_bias = QualityTable(2 * self.own, knots)

    def forward(self, x: Tensor | None, quality: Tensor, quantised: bool) -> tuple[Tensor, Tensor]:
        """Features (B,P,K) of the positions of a pass -> their means and scale indices (B,P,own), or (B,1,own)."""
        out = self.out_bias(quality)[:, None]
        if x is not None:
            h = F.relu(self.first(x, quantised) + self.first_bias(quality)[:, None])
            h = _requantise(h) if quantised else h
            h = F.relu(self.second(h, quantised) + self.second_bias)
            h = _requantise(h) if quantised else h
            out = out + self.out(h, quantised)
        mean, index = out[..., : self.own], out[..., self.own :] * 2**SCALE_BITS + SCALES / 2
        if x is not None and hasattr(self, "direct"):
            d = ste_round(self.direct * 2**DIRECT_BITS) / 2**DIRECT_BITS if quantised else self.direct
            # what is seen of its own group with signs stands behind the magnitudes of it
            begin = self.direct.numel()
            own = x[..., begin : 2 * begin].unflatten(-1, self.direct.shape)
            mean = mean + (own * 2**INPUT_BITS * d).sum(-2)
        if quantised:
            mean, index = ste_round(mean * MEAN_LEVELS) / MEAN_LEVELS, ste_round(index * INDEX_LEVELS) / INDEX_LEVELS
        return mean, index.clamp(0, SCALES - 1)


def _requantise(h: Tensor) -> Tensor:
    return (ste_round(h * 2**HIDDEN_BITS) / 2**HIDDEN_BITS).clamp(max=HIDDEN_MAX / 2**HIDDEN_BITS)


class Prior(nn.Module):
    """All passes; float while the transforms are trained, imitating integers afterwards."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.steps = schedule(arch.prior_groups, arch.prior_detail)
        self.passes = nn.ModuleList(PriorPass(step, arch.prior_width, arch.knots) for step in self.steps)
        self.register_buffer("log_scales", torch.tensor(_scale_table(), dtype=torch.float32), persistent=False)
        self.log_scales: Tensor

    def forward(self, symbols: Tensor, quality: Tensor, quantised: bool = False) -> tuple[Tensor, Tensor]:
        """Symbols (B,C,h,w) as float -> mean and scale index of each, same shape."""
        mean, index = self.predict(*self.features(symbols.permute(0, 2, 3, 1), quantised), quality, quantised)
        return mean.permute(0, 3, 1, 2), index.permute(0, 3, 1, 2)

    def features(self, symbols: Tensor, quantised: bool = False) -> tuple[Tensor, Tensor]:
        """Symbols (B,h,w,C) as float -> what contexts see of each, linear and magnitude, same shape."""
        magnitude = compand(symbols)
        unit = 2.0**-INPUT_BITS
        linear = symbols.clamp(-LINEAR_MAX, LINEAR_MAX) * unit
        return linear, (ste_round(magnitude) if quantised else magnitude) * unit

    def predict(
        self, linear: Tensor, magnitude: Tensor, quality: Tensor, quantised: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Features (B,h,w,C) of all symbols -> mean and scale index of each, same shape."""
        shape, kind = linear.shape, linear.device.type
        if quantised and torch.is_autocast_enabled(kind):  # integers have to be exact
            with torch.autocast(kind, enabled=False):
                return self.predict(linear, magnitude, quality, quantised)
        if torch.is_autocast_enabled(kind):  # bfloat16 has bits enough for symbols up to 256
            linear, magnitude = (t.to(torch.get_autocast_dtype(kind)) for t in (linear, magnitude))
        contexts = iter(_Contexts.apply(self.steps, linear, magnitude))
        found: list[Tensor] = []
        for net, step in zip(self.passes, self.steps, strict=True):
            if count := _count(step, shape):
                x = next(contexts) if net.has_inputs else None
                found += [t.expand(-1, count, -1) for t in net(x, quality, quantised)]
        mean, index = _Places.apply(self.steps, shape, *found)
        return mean, index

    def bits(self, values: Tensor, mean: Tensor, index: Tensor) -> Tensor:
        """-log2 of the logistic mass in unit bins around ``values``; same shape."""
        s = scale_of(index, self.log_scales)
        d = (values - mean).abs()
        # symmetric form: differences of sigmoids on the small side keep their precision
        mass = torch.sigmoid((0.5 - d) / s) - torch.sigmoid((-0.5 - d) / s)
        return -torch.log2(mass.clamp(min=1e-9))


class IntegerPrior:
    """The prior as the format defines it: integers in, integers out.

    Parameters
    ----------
    arch : Architecture
        Sizes.
    tensors : dict of str to Tensor
        As written by :meth:`export`.
    device : str
        Where to compute.
    """

    #: Whether the encoder may move symbols towards its means (rdo.py).
    optimised = True

    def __init__(self, arch: Architecture, tensors: dict[str, Tensor], device: str = "cpu") -> None:
        self.steps = schedule(arch.prior_groups, arch.prior_detail)
        self.latents = arch.latents
        self.device = device
        #: How this device does what stands between products.
        self.passes = passes_on(device)
        self._fused = fused_on(device) if arch.prior_width in FUSED_WIDTHS else None
        self._passes = []
        for i in range(len(self.steps)):
            self._passes.append({k.split(".", 1)[1]: v for k, v in tensors.items() if k.split(".")[0] == str(i)})
        self._check_shapes(arch.prior_width, tensors["compand"])
        _check_sums(tensors)
        self._passes = [self._prepared(found) for found in self._passes]
        self._tensors = [] if self._fused is None else [_tensors(found) for found in self._passes]
        #: Companded magnitudes of symbols, int8 (32769,).
        self.companded = tensors["compand"].to(device=device, dtype=torch.int8)
        #: Logistic scales that the indices were trained to mean; for estimates, not for decoding.
        self.log_scales = torch.tensor(_scale_table(), dtype=torch.float32, device=device)

    def _prepared(self, found: dict[str, Tensor]) -> dict[str, Tensor | Matrix]:
        """Tensors of a pass as :meth:`_run` wants them: halves that round are in the biases."""
        out: dict[str, Tensor | Matrix] = {}
        ints = {k: v.to(device=self.device, dtype=torch.int32) for k, v in found.items()}
        if "first" in found:
            ints["first_shift"] = ints["first_shift"] + (INPUT_BITS - HIDDEN_BITS)
            for name, previous in (("first", 0), ("second", HIDDEN_OFFSET), ("out", HIDDEN_OFFSET)):
                out[name] = Matrix(found[name], self.device)
                ints[f"{name}_bias"] = ints[f"{name}_bias"] + previous * ints[name].sum(1, dtype=torch.int32)
                if name != "out":  # hidden features are written less their offset
                    less = HIDDEN_OFFSET << ints[f"{name}_shift"]
                    ints[f"{name}_bias"] = ints[f"{name}_bias"] + _half(ints[f"{name}_shift"]) - less
                del ints[name]
        # means in eighths: down by shift + HIDDEN_BITS - 3 bits; indices in quarters; what rounds is in the biases
        mean, index = ints["out_shift"].chunk(2)
        ints["mean_shift"], ints["index_shift"] = mean + 1, index + (HIDDEN_BITS - SCALE_BITS - 2)
        ints["out_bias"] = ints["out_bias"] + torch.cat([_half(ints["mean_shift"]), _half(ints["index_shift"])])
        return ints | out

    def _check_shapes(self, width: int, compand: Tensor) -> None:
        """Raise ValueError unless every tensor is there in its shape."""
        for i, (step, found) in enumerate(zip(self.steps, self._passes, strict=True)):
            inputs, own = input_count(step), 2 * step.count
            shapes = {"out_bias": (100, own), "out_shift": (own,)}
            if inputs:
                shapes |= {"first": (width, inputs), "first_shift": (width,), "first_bias": (100, width)}
                shapes |= {"second": (width, width), "second_shift": (width,), "second_bias": (width,)}
                shapes["out"] = (own, width)
            if step.signed:
                shapes["direct"] = (len(step.offsets), step.count)
            if {k: tuple(v.shape) for k, v in found.items()} != shapes:
                raise ValueError(f"prior pass {i} lacks tensors or has them in other shapes")
        if compand.shape != (32769,) or int(compand.max()) > LINEAR_MAX:
            raise ValueError("the table of companded magnitudes has another size or range")

    @staticmethod
    def export(prior: Prior, qualities: int = 100) -> dict[str, Tensor]:
        """Integer tensors of a trained prior: weights int8, shifts uint8, biases int32 per quality 1..100."""
        out: dict[str, Tensor] = {}
        quality = torch.arange(1, qualities + 1, dtype=torch.float32)
        with torch.no_grad():
            for i, net in enumerate(prior.passes):
                own = net.own
                bias = net.out_bias(quality)
                out_shift = net.out.shifts() if net.has_inputs else torch.full((2 * own,), 8.0)
                scale = torch.exp2(out_shift + HIDDEN_BITS)
                out[f"{i}.out_bias"] = torch.floor(bias * scale + 0.5).clamp(-(2**22), 2**22).to(torch.int32)
                out[f"{i}.out_shift"] = out_shift.to(torch.uint8)
                if net.has_inputs:
                    for name, layer, unit in (("first", net.first, INPUT_BITS), ("second", net.second, HIDDEN_BITS)):
                        shift = layer.shifts()
                        bias = net.first_bias(quality) if name == "first" else net.second_bias
                        out[f"{i}.{name}"] = layer.quantised().to(torch.int8)
                        out[f"{i}.{name}_shift"] = shift.to(torch.uint8)
                        out[f"{i}.{name}_bias"] = (
                            torch.floor(bias * torch.exp2(shift + unit) + 0.5).clamp(-(2**22), 2**22).to(torch.int32)
                        )
                    out[f"{i}.out"] = net.out.quantised().to(torch.int8)
                if hasattr(net, "direct"):
                    out[f"{i}.direct"] = torch.floor(net.direct * 2**DIRECT_BITS + 0.5).clamp(-127, 127).to(torch.int8)
            _check_sums(out)
            out["compand"] = torch.floor(compand(torch.arange(32769.0)) + 0.5).to(torch.uint8)
        return out

    def neighbours(self, symbols: Tensor) -> Neighbours:
        """Features, int8, of symbols (B,h,w,C)."""
        features = self.passes.contexts(symbols.reshape(-1, symbols.shape[-1]), self.companded, LINEAR_MAX)
        linear, magnitude = (t.view(symbols.shape) for t in features)
        return Neighbours(linear, magnitude)

    def no_neighbours(self, images: int, grid: tuple[int, int]) -> Neighbours:
        """Features of symbols that are all zero, as they are before the first pass of decoding."""
        zeros = torch.zeros(images, *grid, self.latents, dtype=torch.int8, device=self.device)
        return Neighbours(zeros, zeros)

    def update(self, neighbours: Neighbours, step: Pass, rows: Tensor, symbols: Tensor) -> None:
        """Enter the symbols (P,count) of a decoded pass."""
        seen = neighbours.linear, neighbours.magnitude
        self.passes.enter(symbols, self.companded, *seen, rows, step.start, LINEAR_MAX)

    def run(self, number: int, neighbours: Neighbours, rows: Tensor, quality: Tensor | int) -> tuple[Tensor, Tensor]:
        """One pass: means in eighths (P,count) int16 and scale indices in quarters (P,count) uint8.

        ``quality`` (P,) holds the rounded quality 1..100 of each row, or is that of all.
        """
        step, p = self.steps[number], self._passes[number]
        if self._fused is not None:
            at = _context_places(step, neighbours.shape[2] + 2, self.latents, neighbours.both.device)
            own = step.start, step.count
            bounds = MEAN_MAX, INDEX_MAX
            return self._fused.predict(neighbours.both, rows, own, at, self._tensors[number], quality, *bounds)  # type: ignore[no-any-return]
        x, direct = neighbours.gather(step, rows)
        which = quality - 1
        if x is not None:
            most = -HIDDEN_OFFSET, HIDDEN_MAX - HIDDEN_OFFSET
            h = self.passes.narrow(p["first"].of(x), p["first_bias"][which], p["first_shift"], *most)
            h = self.passes.narrow(p["second"].of(h), p["second_bias"], p["second_shift"], *most)
            out = p["out"].of(h)
        else:
            out = torch.zeros(len(rows), 2 * step.count, dtype=torch.int32, device=self.device)
        if direct is not None:
            own = (direct.to(torch.int32) * p["direct"]).sum(1, dtype=torch.int32)
            out[:, : step.count] += own << (p["out_shift"][: step.count] - (DIRECT_BITS - HIDDEN_BITS))
        shifts = p["mean_shift"], p["index_shift"]
        return self.passes.expected(out, p["out_bias"][which], *shifts, MEAN_MAX, INDEX_MAX)


def _tensors(found: dict[str, Any]) -> PassTensors:
    """Those of a pass, as a kernel takes them."""
    part = {k: v.int8 if isinstance(v, Matrix) else v for k, v in found.items()}
    if "direct" in part:
        count = part["direct"].shape[1]
        part["direct_shift"] = part["out_shift"][:count] - (DIRECT_BITS - HIDDEN_BITS)
    return PassTensors(*(None if name not in part else part[name].contiguous() for name in PassTensors._fields))


@lru_cache(maxsize=256)
def _context_places(step: Pass, pitch: int, latents: int, device: torch.device) -> Contexts:
    """Where a pass finds its features, with so many symbols from one row to the next."""
    names = input_names(step)
    with torch.inference_mode(False):
        kinds = torch.tensor([int(kind == "linear") for kind, *_ in names], dtype=torch.int32)
        offsets = torch.tensor([(dy * pitch + dx) * latents + c for _, dy, dx, c in names], dtype=torch.int64)
        own = [(dy * pitch + dx) * latents for dy, dx in step.offsets] if step.signed else []
        around = torch.tensor(own, dtype=torch.int64)
    found = Contexts(*(t.to(device) for t in (kinds, offsets, around)))
    synchronize(device)
    return found


def _check_sums(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless all sums of products, biases included, stay below 2^23."""
    for name, weight in tensors.items():
        if name.endswith((".first", ".second", ".out")):
            most = LINEAR_MAX if name.endswith(".first") else HIDDEN_MAX
            bias = tensors[f"{name}_bias"].abs().double()
            total = weight.abs().double().sum(1) * most + (bias.amax(0) if bias.ndim > 1 else bias)
            if float(total.max()) >= 2**23:
                raise ValueError(f"prior: weights of {name} are too large for exact sums; train with a lower rate")


def _half(shift: Tensor) -> Tensor:
    """What makes a shift to the right round to nearest: 2^(shift - 1), or 0 for no shift."""
    return (1 << shift) >> 1


def passes(prior: IntegerPrior, neighbours: Neighbours) -> Iterator[tuple[int, Pass, Tensor, Tensor, Tensor]]:
    """Number, step, padded rows, flat rows and image numbers of every pass that has positions."""
    for number, step in enumerate(prior.steps):
        rows, flat, image = neighbours.rows(step)
        if len(rows):
            yield number, step, rows, flat, image
