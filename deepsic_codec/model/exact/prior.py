"""The prior as the format defines it: integers in, integers out.

Each step is a small perceptron over gathered neighbours: features (P,K) -> width -> width -> mean and scale index of
each channel. Gathering instead of convolving makes every layer one product of 8-bit integers, which is the same on any
backend (`matrix`, `docs/entropy-coder.md`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.exact.fixed import QUALITIES
from deepsic_codec.model.exact.matrix import Matrix
from deepsic_codec.model.logistic import INDEX_MAX, log_scales
from deepsic_codec.model.neighbours import Neighbours
from deepsic_codec.model.ops.select import fused_on, passes_on
from deepsic_codec.model.ops.tensor_ops import PassTensors
from deepsic_codec.model.schedule import Step, schedule

#: Features are symbols clipped to +-LINEAR_MAX, and companded magnitudes.
LINEAR_MAX = 127
#: Input features are integers in units of 2^-INPUT_BITS, hidden ones in units of 2^-HIDDEN_BITS.
INPUT_BITS, HIDDEN_BITS = 3, 4
HIDDEN_MAX = 255
#: Hidden features less this have 8 bits and a sign.
HIDDEN_OFFSET = 128
#: Last layer: scale index = 32 + 2^SCALE_BITS o, mean = o.
SCALE_BITS = 3
#: Weights of the direct prediction are integers in units of 2^-DIRECT_BITS.
DIRECT_BITS = 6
MEAN_MAX = 32767
#: Entries of the table of companded magnitudes.
COMPANDED = 32769
#: Widths for which there is a kernel of a whole step.
FUSED_WIDTHS = (32, 64, 128)


class IntegerPrior:
    """Predictions of a model file's prior (`family.CodingPrior`).

    Parameters
    ----------
    arch : Architecture
        Sizes.
    tensors : mapping of str to Tensor
        As `export.export_prior` writes them.
    device : str
        Where to compute.

    Raises
    ------
    KeyError, ValueError
        If the tensors do not fit the architecture, or their sums could be inexact.
    """

    def __init__(self, arch: Architecture, tensors: Mapping[str, Tensor], device: str = "cpu") -> None:
        self.steps = schedule(arch.prior_groups, arch.prior_detail)
        self.latents = arch.latents
        self.device = device
        self.ops = passes_on(device)
        self._fused = fused_on(device) if arch.prior_width in FUSED_WIDTHS else None
        parts: list[dict[str, Tensor]] = []
        for i in range(len(self.steps)):
            parts.append({k.split(".", 1)[1]: v for k, v in tensors.items() if k.split(".")[0] == str(i)})
        for i, (step, part) in enumerate(zip(self.steps, parts, strict=True)):
            _check_shapes(i, step, part, arch.prior_width)
        compand = tensors["compand"]
        if compand.shape != (COMPANDED,) or int(compand.max()) > LINEAR_MAX:
            raise ValueError("the table of companded magnitudes has another size or range")
        check_prior_sums(tensors)
        self._parts = [_prepared(part, device) for part in parts]
        self._tensors = [] if self._fused is None else [_tensors(part) for part in self._parts]
        #: Companded magnitudes of symbols, int8 (COMPANDED,).
        self.companded = compand.to(device=device, dtype=torch.int8)
        #: Logarithms of the scales that the indices were trained to mean; for estimates, not for decoding.
        self.log_scales = log_scales(device)

    def neighbours(self, symbols: Tensor) -> Neighbours:
        """Features, int8, of symbols (N,h,w,C)."""
        features = self.ops.contexts(symbols.reshape(-1, symbols.shape[-1]), self.companded, LINEAR_MAX)
        linear, magnitude = (t.view(symbols.shape) for t in features)
        return Neighbours(linear, magnitude)

    def no_neighbours(self, images: int, grid: tuple[int, int]) -> Neighbours:
        """Features of symbols that are all zero, as they are before the first step of decoding."""
        zeros = torch.zeros(images, *grid, self.latents, dtype=torch.int8, device=self.device)
        return Neighbours(zeros, zeros)

    def update(self, neighbours: Neighbours, step: Step, rows: Tensor, symbols: Tensor) -> None:
        """Enter the symbols (P,count) of a decoded step at its padded rows (P,), in place."""
        features = neighbours.linear, neighbours.magnitude
        self.ops.enter(symbols, self.companded, *features, rows, step.start, LINEAR_MAX)

    def run(self, number: int, neighbours: Neighbours, rows: Tensor, quality: Tensor | int) -> tuple[Tensor, Tensor]:
        """Means in eighths int16 and scale indices in quarters uint8, (P,count), of one step.

        `quality` holds the whole quality 1..100 of each row, int64 (P,), or is that of all rows.
        """
        step, p = self.steps[number], self._parts[number]
        if self._fused is not None:
            at = neighbours.context_offsets(step)
            channels = step.start, step.count
            bounds = MEAN_MAX, INDEX_MAX
            return self._fused.predict(neighbours.both, rows, channels, at, self._tensors[number], quality, *bounds)  # type: ignore[no-any-return]
        x, row = neighbours.gather(step, rows), quality - 1
        if x is None:
            out = torch.zeros(len(rows), 2 * step.count, dtype=torch.int32, device=self.device)
        else:
            bounds = -HIDDEN_OFFSET, HIDDEN_MAX - HIDDEN_OFFSET
            h = self.ops.narrow(p["first"].of(x), p["first_bias"][row], p["first_shift"], *bounds)
            h = self.ops.narrow(p["second"].of(h), p["second_bias"], p["second_shift"], *bounds)
            out = p["out"].of(h)
            if step.signed:
                direct = x[:, step.direct_inputs].view(len(rows), len(step.offsets), step.count)
                added = (direct.to(torch.int32) * p["direct"]).sum(1, dtype=torch.int32)
                out[:, : step.count] += added << p["direct_shift"]
        shifts = p["mean_shift"], p["index_shift"]
        return self.ops.expected(out, p["out_bias"][row], *shifts, MEAN_MAX, INDEX_MAX)


def _check_shapes(number: int, step: Step, part: Mapping[str, Tensor], width: int) -> None:
    """Raise ValueError unless every tensor of a step is there, in its shape."""
    outputs = 2 * step.count
    shapes: dict[str, tuple[int, ...]] = {"out_bias": (QUALITIES, outputs), "out_shift": (outputs,)}
    if step.input_count:
        shapes |= {"first": (width, step.input_count), "first_shift": (width,), "first_bias": (QUALITIES, width)}
        shapes |= {"second": (width, width), "second_shift": (width,), "second_bias": (width,)}
        shapes["out"] = (outputs, width)
    if step.signed:
        shapes["direct"] = (len(step.offsets), step.count)
    if {k: tuple(v.shape) for k, v in part.items()} != shapes:
        raise ValueError(f"prior step {number}: tensors are missing or have other shapes")


def check_prior_sums(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all sums of products, biases included, stay below 2^23."""
    for name, weight in tensors.items():
        if name.endswith((".first", ".second", ".out")):
            largest = LINEAR_MAX if name.endswith(".first") else HIDDEN_MAX
            bias = tensors[f"{name}_bias"].abs().double()
            total = weight.abs().double().sum(1) * largest + (bias.amax(0) if bias.ndim > 1 else bias)
            if float(total.max()) >= 2**23:
                raise ValueError(f"prior: weights of {name} are too large for exact sums; train with a lower rate")


def _prepared(part: Mapping[str, Tensor], device: str) -> dict[str, Any]:
    """Tensors of a step as `IntegerPrior.run` uses them, with the halves that round added to the biases."""
    matrices: dict[str, Matrix] = {}
    ints = {k: v.to(device=device, dtype=torch.int32) for k, v in part.items()}
    if "first" in part:
        ints["first_shift"] = ints["first_shift"] + (INPUT_BITS - HIDDEN_BITS)
        for name, offset in (("first", 0), ("second", HIDDEN_OFFSET), ("out", HIDDEN_OFFSET)):
            matrices[name] = Matrix(part[name], device)
            ints[f"{name}_bias"] = ints[f"{name}_bias"] + offset * ints[name].sum(1, dtype=torch.int32)
            if name != "out":  # hidden features are written less their offset
                less = HIDDEN_OFFSET << ints[f"{name}_shift"]
                ints[f"{name}_bias"] = ints[f"{name}_bias"] + _half(ints[f"{name}_shift"]) - less
            del ints[name]
    # means in eighths: down by shift + HIDDEN_BITS - 3 bits; indices in quarters
    mean, index = ints["out_shift"].chunk(2)
    ints["mean_shift"], ints["index_shift"] = mean + 1, index + (HIDDEN_BITS - SCALE_BITS - 2)
    ints["out_bias"] = ints["out_bias"] + torch.cat([_half(ints["mean_shift"]), _half(ints["index_shift"])])
    if "direct" in part:
        ints["direct_shift"] = mean - (DIRECT_BITS - HIDDEN_BITS)
    return ints | matrices


def _half(shift: Tensor) -> Tensor:
    """What makes a shift to the right round to nearest: 2^(shift - 1), or 0 for no shift."""
    return (1 << shift) >> 1


def _tensors(part: Mapping[str, Any]) -> PassTensors:
    """Tensors of a step as a fused kernel takes them."""
    plain = {k: v.int8 if isinstance(v, Matrix) else v for k, v in part.items()}
    return PassTensors(*(None if name not in plain else plain[name].contiguous() for name in PassTensors._fields))
