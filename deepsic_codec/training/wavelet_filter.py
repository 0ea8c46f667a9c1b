"""Train the filter of wavelets, and write its weights.

    python -m deepsic_codec.training.wavelet_filter --images photographs.zip --scenes scenes/ --steps 5000 \
        --out deepsic_codec/data/wavelet-filter.txt

Crops are coded as wavelets of several rates; the network learns to turn their decoded components into the components
before. It is trained with bounds on hidden values as in its integer form, and with the rounding of it in the second
half. One filter is for all imagery: `docs/wavelet.md` has it.
"""

import argparse
import base64
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from deepsic_codec.codec import spectral
from deepsic_codec.codec.wavelet import components_of
from deepsic_codec.codec.wavelet_filter import CHANGE_BITS, LAYERS, SAMPLE_BITS
from deepsic_codec.codec.wavelet_rate import estimated_bytes
from deepsic_codec.io.sources import open_sources
from deepsic_codec.model.exact.fixed import ste_round
from deepsic_codec.payload.coders.subbands import encode_planes
from deepsic_codec.payload.steps import STEPS, step_of
from deepsic_codec.payload.wavelet import FLOAT_LEVELS, to_coefficients, to_components
from deepsic_codec.training.data import read_images
from deepsic_codec.training.soap import Soap

#: Bits of each sample that crops of photographs, and of scenes, are coded with.
RATES = {"images": (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.6, 2.4), "scenes": (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)}
#: Edge of crops, crops of a source, edge of what is drawn of a crop in a step, how many, and most bands of a crop.
CROP, CROPS, EDGE, BATCH, BANDS = 256, 3, 128, 8, 8
#: Binary places and largest value of hidden values.
HIDDEN_BITS, HIDDEN_MAX = 6, 255 / 64
#: Bounds of samples in steps.
SAMPLE_MAX = float(1 << 15 - SAMPLE_BITS)
LEARNING_RATE, WARM_UP = 5e-3, 50
#: Squared error in steps below which nothing is worth correcting.
NEGLIGIBLE = 0.01


class Pair(NamedTuple):
    """Components of a crop, and what they decode to, float32 (components,height,width) in steps."""

    exact: NDArray[np.float32]
    decoded: NDArray[np.float32]


class WaveletFilter(nn.Module):
    """The filter as it is trained.

    Attributes
    ----------
    integer : bool
        Whether weights and hidden values are rounded as in the integer form.
    """

    def __init__(self) -> None:
        super().__init__()
        self.integer = False
        shapes = [(outputs, inputs, math.isqrt(taps), math.isqrt(taps)) for outputs, inputs, taps in LAYERS]
        self.weight = nn.ParameterList(nn.init.kaiming_uniform_(torch.empty(shape), math.sqrt(5)) for shape in shapes)
        self.bias = nn.ParameterList(torch.zeros(shape[0]) for shape in shapes)
        for bias, (_, inputs, _) in zip(self.bias[1:-1], LAYERS[1:-1], strict=True):
            nn.init.uniform_(bias, -(inputs**-0.5), inputs**-0.5)
        nn.init.normal_(self.weight[0], 0, 0.12)
        nn.init.zeros_(self.weight[-1])

    def weights(self) -> list[Tensor]:
        """Return the weights of all layers; those of each output of the first add up to 0."""
        first, *others = self.weight
        return [first - first.mean((1, 2, 3), keepdim=True), *others]

    def forward(self, x: Tensor) -> Tensor:
        """(B,1,H,W) in steps, H and W even -> the same shape."""
        values = (x - x.mean((2, 3), keepdim=True)).clamp(-SAMPLE_MAX, SAMPLE_MAX)
        values = self._rounded(values, SAMPLE_BITS)
        h = F.pixel_unshuffle(F.pad(values, (2, 2, 2, 2), "replicate"), 2)
        last = len(LAYERS) - 1
        for number, (weight, bias) in enumerate(zip(self.weights(), self.bias, strict=True)):
            if number == last:
                h = F.pad(h, (1, 1, 1, 1), "replicate")
            h = F.conv2d(h, self._in_bytes(weight), bias)
            if number < last:
                h = self._rounded(F.hardtanh(h, 0, HIDDEN_MAX), HIDDEN_BITS)
        return x + F.pixel_shuffle(h, 2)

    def _rounded(self, values: Tensor, bits: int) -> Tensor:
        return ste_round(values * 2.0**bits) * 2.0**-bits if self.integer else values

    def _in_bytes(self, weight: Tensor) -> Tensor:
        if not self.integer:
            return weight
        unit = 2.0 ** weight_bits(weight).view(-1, 1, 1, 1)
        return weight + ((weight * unit).round().clamp(-127, 127) / unit - weight).detach()


def weight_bits(weight: Tensor) -> Tensor:
    """Return the binary places that the weights of each output have in a byte."""
    return torch.floor(torch.log2(127 / weight.detach().flatten(1).abs().amax(1).clamp(min=1e-6)))


def fit(parts: Sequence[Sequence[Pair]], steps: int, seed: int = 1) -> WaveletFilter:
    """Train a filter on pairs, of each part alike."""
    torch.manual_seed(seed)
    rng, net = np.random.default_rng(seed), WaveletFilter()
    optimiser = Soap([{"params": list(net.parameters())}], LEARNING_RATE)
    for step in range(steps):
        net.integer = 2 * step >= steps
        fall = max(0.01, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * fall * min(1.0, (step + 1) / WARM_UP)
        exact, decoded = _batch(parts, rng)
        error = (net(decoded) - exact).square().mean((1, 2, 3))
        before = (decoded - exact).square().mean((1, 2, 3))
        loss = (error / (before + NEGLIGIBLE)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
    return net


def _batch(parts: Sequence[Sequence[Pair]], rng: np.random.Generator) -> list[Tensor]:
    columns: tuple[list[Tensor], list[Tensor]] = [], []
    for _ in range(BATCH):
        part = parts[int(rng.integers(len(parts)))]
        pair = part[int(rng.integers(len(part)))]
        component, (height, width) = rng.integers(len(pair.exact)), pair.exact.shape[1:]
        y, x = (2 * int(rng.integers((size - EDGE) // 2 + 1)) for size in (height, width))
        turned, sign = rng.random() < 0.5, float(rng.choice([-1, 1]))
        for column, values in zip(columns, pair, strict=True):
            cut = torch.from_numpy(values[component, y : y + EDGE, x : x + EDGE]) * sign
            column.append((cut.T if turned else cut)[None])
    return [torch.stack(column) for column in columns]


@torch.no_grad()
def integers(net: WaveletFilter) -> bytes:
    """Return the weights, shifts and biases of all layers, as `wavelet_filter.tables` reads them."""
    data, bits = b"", SAMPLE_BITS
    flat = torch.zeros(4)  # what a constant plane gives
    for number, (weight, trained) in enumerate(zip(net.weights(), net.bias, strict=True)):
        places, out_bits = weight_bits(weight), CHANGE_BITS if number == len(LAYERS) - 1 else HIDDEN_BITS
        exact = weight.flatten(1).double() * 2.0 ** places[:, None]
        whole = exact.round()
        if number == 0:
            for row, scaled in zip(whole, exact, strict=True):  # weights that rounding moved most take up the sum
                excess = int(row.sum())
                moved = ((row - scaled) * (1 if excess > 0 else -1)).argsort(descending=True)[: abs(excess)]
                row[moved] -= 1 if excess > 0 else -1
        whole = whole.clamp(-127, 127)
        shifts = places + bits - out_bits
        if shifts.min() < 1:
            raise ValueError(f"layer {number + 1}: weights of {weight.abs().max():.3g} are too large")
        half = 2.0 ** (shifts - 1)
        bias = (trained.double() * 2.0 ** (places + bits)).round() + half
        of_squares = whole.reshape(*weight.shape[:2], -1).sum(2)
        if out_bits == CHANGE_BITS:
            bias = half - of_squares @ flat.double()
        flat = torch.floor((of_squares @ flat.double() + bias) * 2.0**-shifts).clamp(0, 255)
        data += whole.numpy().astype(np.int8).tobytes() + shifts.numpy().astype(np.int8).tobytes()
        data += bias.numpy().astype("<i4").tobytes()
        bits = HIDDEN_BITS
    return data


def components_at(values: NDArray[Any], rates: Sequence[float]) -> Iterator[tuple[NDArray[Any], NDArray[Any], int]]:
    """Yield components and coefficients of integers (height,width,bands), and the code for so many bits a sample."""
    values = np.ascontiguousarray(values, np.int32)[None]
    guess = max(1.0, float(values.std()) / 16)
    matrix = spectral.choose(values, None, guess) if values.shape[-1] > 1 else None
    components = components_of(values, matrix)
    coefficients = to_coefficients(components.copy())
    for rate in rates:
        low, high = 0, STEPS - 1
        while high - low > 16:
            middle = (low + high) // 2
            few = 8 * estimated_bytes(coefficients, middle) < rate * values.size
            low, high = (low, middle) if few else (middle, high)
        yield components, coefficients, high


def pairs(values: NDArray[Any], rates: Sequence[float]) -> Iterator[Pair]:
    """Code integers (height,width,bands) at about so many bits a sample."""
    for components, coefficients, code in components_at(values, rates):
        _, _, planes = encode_planes(coefficients.copy(), code, keep=True)
        unit = step_of(code) * 16
        exact, decoded = ((one[0] / unit).astype(np.float32) for one in (components, to_components(planes)))
        yield Pair(exact, decoded)


def crops(
    values: NDArray[Any], rng: np.random.Generator, edges: Sequence[int] = (CROP,) * CROPS, least: int = EDGE
) -> Iterator[NDArray[Any]]:
    """Yield crops of an image (height,width,bands), no smaller than the least edge; of floats, as integers."""
    values = values[..., :BANDS]
    if values.dtype.kind == "f":
        low, high = np.nanmin(values), np.nanmax(values)
        values = np.nan_to_num((values - low) * (FLOAT_LEVELS / max(high - low, 1e-30))).astype(np.int32)
    for edge in edges:
        height, width = (min(edge, size) // 2 * 2 for size in values.shape[:2])
        if min(height, width) >= least:
            y, x = int(rng.integers(values.shape[0] - height + 1)), int(rng.integers(values.shape[1] - width + 1))
            yield values[y : y + height, x : x + width]


def read_parts(images: Sequence[str], scenes: Sequence[str]) -> Iterator[tuple[list[NDArray[Any]], tuple[float, ...]]]:
    """Yield photographs, then scenes (height,width,bands) with at most one more axis, and the rates to code them at."""
    yield [pixels for path in images for _, pixels in read_images(path)], RATES["images"]
    others = []
    for source in open_sources(scenes, keep_alpha=True):
        axes = [axis for axis in source.axes if axis not in "yx"]
        if len(axes) <= 1:
            values = np.asarray(source.values)
            others.append(np.moveaxis(values, source.axes.index(axes[0]), -1) if axes else values[..., None])
    yield others, RATES["scenes"]


def main(argv: Sequence[str] | None = None) -> None:
    """Train a filter and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", required=True, help="photographs without coding loss")
    parser.add_argument("--scenes", nargs="+", required=True, help="files of other imagery, of any depth and bands")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", required=True, help="file of the weights, in base 85")
    arguments = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    parts = []
    for images, rates in read_parts(arguments.images, arguments.scenes):
        parts.append([pair for image in images for crop in crops(image, rng) for pair in pairs(crop, rates)])
        print(f"{len(parts[-1])} coded crops of {len(images)} images", flush=True)
    text = base64.b85encode(integers(fit(parts, arguments.steps))).decode()
    lines = [text[start : start + 80] for start in range(0, len(text), 80)]
    Path(arguments.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
