"""Latent refinement: symbols that are chosen by the pixels that the decoder makes of them.

The optimised quantiser (`quantise`) decides symbol by symbol. Refinement differentiates the loss D + R / lambda of the
whole image through the synthesis transform and through the contexts of the prior, several times, and chooses all
symbols together. It takes many times the work of encoding and saves bits at the same quality. The bit stream and the
decoder do not depend on it (Yang, Bamler and Mandt 2020, "Improving Inference for Neural Image Compression", explain
why there is something to gain).

The method is mean-field annealing. It takes fewer steps than the gradient descent on noisy latents of that paper. Each
symbol has a distribution over three neighbouring integers, with probabilities exp(-cost / temperature), where costs are
in bits. The image is decoded from the expected values of all symbols, which gives new costs, and the temperature falls
until each distribution has collapsed to one value.

With a trellis, whole paths have such probabilities. All of them never collapse to one path together: a symbol whose
parity changes changes the quantisers of all that follow. So groups of channels are decided one after another, each for
what those before it have left.

Gradients are floating point: unlike with lower efforts, equal images may give payloads that differ by a few symbols on
other machines. Decoding is as exact as with any effort.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.distortion import Distortion, total
from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.export import restore_network, restore_prior
from deepsic_codec.model.exact.prior_formats import INPUT_BITS
from deepsic_codec.model.likelihood import scale_of
from deepsic_codec.model.networks import Synthesis, step_lambda
from deepsic_codec.model.paths import ChunkPaths, Prices
from deepsic_codec.model.prior import Prior, compand
from deepsic_codec.model.quantise import UNIT
from deepsic_codec.payload.coders.symbols import SYMBOL_MAX
from deepsic_codec.payload.constants import LATENT_STRIDE

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """Number of rounds and temperatures of the annealing.

    Attributes
    ----------
    rounds : int
        How often the loss is differentiated.
    temperature : float
        Temperature in the first round, in bits.
    pace : float
        Share of the way to its expected value that a symbol moves in a round. All symbols move at once, and those that
        overlap correct the same error twice: with more than a half the loss diverges.
    inertia : float
        Share of a round's step that is repeated in the next round.
    """

    rounds: int
    temperature: float
    pace: float
    inertia: float


@dataclass(frozen=True)
class PathSchedule:
    """Rounds for a path through the trellis, each of which differentiates the loss once.

    Attributes
    ----------
    soft : int
        Rounds in which all symbols are expected values.
    temperature : float
        Temperature in the first of them, in bits. It falls to 1 and stays there. At 0, symbols are the best path.
    decided : tuple of int
        Further rounds: how many groups of the prior are decided after each, and stay as they are. The last decides all.
    pace : (float, float)
        Share of the way to what the slopes ask for that targets move, in the first round and in the last.
    """

    soft: int
    temperature: float
    decided: tuple[int, ...]
    pace: tuple[float, float]

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return self.soft + len(self.decided)

    def at(self, number: int) -> tuple[float, int, float]:
        """Return the temperature of a round, the groups that are decided after it, and its pace."""
        fall = min(1.0, number / max(1, self.soft - 1))
        decided = self.decided[number - self.soft] if number >= self.soft else 0
        first, last = self.pace
        temperature = self.temperature and self.temperature ** (1 - fall)
        return temperature, decided, first * (last / first) ** (number / max(1, self.rounds - 1))


#: By level of the encoder's effort; these and the other numbers below were tried on photographs.
SCHEDULES = {2: Schedule(3, 0.3, 0.3, 0.2), 3: Schedule(8, 1.0, 0.25, 0.5), 4: Schedule(24, 2.0, 0.25, 0.5)}
#: Temperature in the last round.
LAST_TEMPERATURE = 0.2
#: By level, for paths.
PATH_SCHEDULES = {
    2: PathSchedule(3, 0.0, (), (0.7, 0.2)),
    3: PathSchedule(4, 1.5, (2, 3, 4, 5), (0.4, 0.4)),
    4: PathSchedule(14, 3.0, (0, 1, 1, 2, 2, 3, 3, 4, 4, 5), (0.3, 0.3)),
}
#: Weight of the distortion against lambda of the nominal step, by quality: about as many bits as with effort 1.
TRADE_QUALITIES, TRADE = (20.0, 50.0), (0.9, 1.25)
#: Error of symbols that move at the same time, against the sum of the errors that each of them adds alone.
INTERFERENCE = 1.2
#: Before anything is measured: the error that a symbol adds to the pixels, against an orthonormal transform, and the
#: number of latents that this guess weighs as much as. Few for MS-SSIM, in which fine errors weigh less than coarse.
GUESSED_CURVATURE, GUESS_COUNT = 0.8, {"mse": 32, "ms-ssim": 2}
#: How far from its present value a symbol of a path may want to be, in steps. Curvature is that of the mean symbol:
#: others would overshoot.
REACH = 1.25
#: Price of errors of symbols that are decided, in bits: no path has any.
DECIDED = 4096.0
#: Edge of the windows that are differentiated at once, and width of the border around them, in latents; gradients take
#: some hundred bytes a pixel.
WINDOW, HALO = 48, 6


def trade(quality: Tensor) -> Tensor:
    """Return the price of a squared error of one grey level in bits, for qualities (N,)."""
    (low, high), (first, last) = TRADE_QUALITIES, TRADE
    share = ((quality - low) / (high - low)).clamp(0, 1)
    return (first + (last - first) * share) * step_lambda(quality) / 3  # three samples share a pixel's bits


class Window(NamedTuple):
    """A window of a grid of latents: its number, and ranges of rows and columns.

    Inner parts of windows share out the grid; outer parts add a border; the core is the inner part within the outer.
    """

    number: int
    inner: tuple[slice, ...]
    outer: tuple[slice, ...]
    core: tuple[slice, ...]


def windows(height: int, width: int) -> Iterator[Window]:
    """Windows of a grid of latents."""
    for number, (y, x) in enumerate(product(range(0, height, WINDOW), range(0, width, WINDOW))):
        yield Window(number, *zip(_ranges(y, height), _ranges(x, width), strict=True))


def _ranges(start: int, end: int) -> tuple[slice, slice, slice]:
    """Inner, outer and core range of a window along one axis."""
    stop, first = min(start + WINDOW, end), max(0, start - HALO)
    return slice(start, stop), slice(first, min(end, stop + HALO)), slice(start - first, stop - first)


class RefineState:
    """A batch: its distortion, dequantiser steps (N,C), qualities (N,), and its measured curvature."""

    def __init__(self, distortion: Distortion, step: Tensor, quality: Tensor) -> None:
        self.distortion, self.step, self.quality = distortion, step, quality
        self.weight = trade(quality)
        #: Number of windows that were measured, sums of their squared slopes (N,1,1,C), and sums of their weights.
        self.measured = 0
        self._slopes = self._weights = torch.zeros((), dtype=torch.float32, device=step.device)

    def residuals(self, decoded: Tensor, window: Window) -> list[Tensor]:
        """Residuals of a window's decoded images (N,H,W,3), without what pads them to whole latents."""
        _, height, width, _ = self.distortion.images.shape
        rows, columns = (_pixels(latents, end) for latents, end in zip(window.outer, (height, width), strict=True))
        unpadded = decoded[:, : rows.stop - rows.start, : columns.stop - columns.start]
        return self.distortion.residuals(unpadded, rows, columns)

    def loss(self, window: Window, bits: Tensor, residuals: list[Tensor]) -> Tensor:
        """Loss (N,) of a window's core, from bits (N,h,w,C) and residuals of its outer part."""
        rows, columns = map(_pixels, window.core)
        return bits[:, *window.core].sum((1, 2, 3)) + total(residuals, (rows, columns)) * self.weight

    def measure(self, residuals: list[Tensor], latents: Tensor, window: Window, local: Tensor) -> None:
        """Measure how a window's latents act on its residuals, which are differentiated once more.

        The squared gradient of a sum with random signs is on average that of all residuals (Hutchinson's estimate of a
        diagonal).
        """
        random = torch.Generator().manual_seed(window.number)  # an image's result does not depend on its batch
        parts = []
        for part in residuals:
            signs = torch.randint(0, 2, part.shape[1:], generator=random).to(part) * 2 - 1
            parts.append((part * signs).sum())
        (slope,) = torch.autograd.grad(torch.stack(parts).sum(), latents)
        self._slopes = self._slopes + slope[:, *window.core].square().sum((1, 2), keepdim=True)
        self._weights = self._weights + local.sum((1, 2), keepdim=True)
        self.measured += 1

    def curvature(self) -> Tensor:
        """Distortion (N,1,1,C) that a symbol off by one adds where errors weigh one, from the measured windows."""
        count = GUESS_COUNT[self.distortion.tune] * self.distortion.local.mean((1, 2), keepdim=True)
        guess = GUESSED_CURVATURE * (self.step[:, None, None, :] * UNIT) ** 2
        return (self._slopes + count * guess) / (self._weights + count)


class Costs(NamedTuple):
    """Loss (N,) of a window's core in bits, and how it changes with its symbols (N,h,w,C), as `expected` takes it."""

    loss: Tensor
    symbols: Tensor
    mean: Tensor
    scale_index: Tensor
    scale: Tensor
    slope: Tensor
    by_magnitude: Tensor
    curvature: Tensor

    def expected(self, temperature: float) -> Tensor:
        """Expected values of the symbols."""
        with torch.no_grad():
            return expected(self.symbols, self.mean, *self[4:], temperature)

    def lowest(self) -> Tensor:
        """Symbols of the least cost, without their own bits."""
        with torch.no_grad():
            by_symbol = 4 / math.log(2) / (1 + self.symbols.abs()) * self.symbols.sign()  # of `compand`
            return self.symbols - (self.slope + self.by_magnitude * by_symbol) / (2 * self.curvature)


class Refiner:
    """The decoder of an integer model in differentiable form.

    Parameters
    ----------
    arch : Architecture
        Sizes.
    synthesis, prior : dict of str to Tensor
        Tensors of the synthesis transform and of the prior, as a model file has them.
    device : torch.device
        Where to compute.
    bf16 : bool
        Whether to multiply matrices in bfloat16.
    """

    def __init__(
        self, arch: Architecture, synthesis: Tensors, prior: Tensors, device: torch.device, bf16: bool
    ) -> None:
        self._synthesis, self._prior = Synthesis(arch).float(), Prior(arch).float()  # whatever the default dtype is
        restore_network(self._synthesis, synthesis)
        restore_prior(self._prior, prior)
        self._synthesis.bounded = True  # as in the integer form: without it, the loss of some images diverges
        for net in (self._synthesis, self._prior):
            net.requires_grad_(False).eval().to(device)
        self.device, self.bf16 = device, bf16
        self._channels = [0, *accumulate(arch.prior_groups)]

    def refine(
        self, images: Tensor, symbols: Tensor, steps: Tensor, quality: Tensor, schedule: Schedule, tune: str = "mse"
    ) -> Tensor:
        """Improve the symbols int32 (N,h,w,C) of a batch of images.

        Parameters
        ----------
        images : Tensor
            Grey levels float32 (N,H,W,3).
        symbols : Tensor
            Chosen by the optimised quantiser; those of an image stay where refinement does not lower its loss.
        steps : Tensor
            Dequantiser steps int32 (N,C), in 2^-STEP_BITS units of integer latents.
        quality : Tensor
            Whole qualities, int64 (N,).
        schedule : Schedule
            Rounds and temperatures.
        tune : str
            Distortion to lower: `"mse"` or `"ms-ssim"`.
        """
        with torch.inference_mode(False):  # whose tensors autograd refuses
            state = self._state(images, steps, quality, tune)
            start = symbols.to(self.device, torch.float32).clone()
            current, velocity, first_loss = start, torch.zeros_like(start), torch.zeros_like(state.weight)
            for number in range(schedule.rounds):
                progress = number / max(1, schedule.rounds - 1)
                temperature = schedule.temperature * (LAST_TEMPERATURE / schedule.temperature) ** progress
                target = torch.empty_like(current)
                for window in windows(*start.shape[1:3]):
                    costs = self._differentiated(state, current, window)
                    target[:, *window.inner] = costs.expected(temperature)
                    if number == 0:
                        first_loss += costs.loss
                velocity = schedule.inertia * velocity + schedule.pace * (target - current)
                current = (current + velocity).clamp_(-SYMBOL_MAX, SYMBOL_MAX)
            current = torch.round(current)
            better = self._loss(state, current) < first_loss
            return torch.where(better[:, None, None, None], current, start).to(torch.int32)

    def refine_path(
        self,
        images: Tensor,
        latents: NDArray[np.int32],
        paths: ChunkPaths,
        schedule: PathSchedule,
        tune: str = "mse",
        size: int = 1,
    ) -> Tensor:
        """Return symbols int16 (S,h,w,C) of a chunk, those of a path through the trellis.

        Parameters
        ----------
        images : Tensor
            Grey levels float32 (S,H,W,3).
        latents : ndarray
            int32 (S,h,w,C).
        paths : ChunkPaths
            Through the trellis of this chunk. That of lower efforts stays where no better one is found.
        schedule : PathSchedule
        tune : str
            As of `refine`.
        size : int
            Images whose loss is differentiated at once.
        """
        with torch.inference_mode(False):
            parts = [slice(k, k + size) for k in range(0, len(images), size)]
            steps, quality = torch.from_numpy(2 * paths.half), torch.tensor(paths.quality)
            states = [
                self._state(images[part], steps.expand(n, -1), quality.expand(n), tune)
                for part, n in ((part, len(images[part])) for part in parts)
            ]
            targets, start = (t.to(self.device) / 2 for t in paths.first(latents))
            current, kept = start.clone(), 0
            mean, index, lowest = (torch.empty_like(current) for _ in range(3))
            for number in range(schedule.rounds):
                temperature, groups, pace = schedule.at(number)
                for part, state in zip(parts, states, strict=True):
                    for window in windows(*current.shape[1:3]):
                        costs, place = self._differentiated(state, current[part], window), (part, *window.inner)
                        mean[place], index[place], lowest[place] = costs.mean, costs.scale_index, costs.lowest()
                goal = current + (lowest - current).clamp(-REACH, REACH)
                targets[..., kept:] += pace * (goal - targets)[..., kept:]
                price, weights = _path_prices(states)
                price[:kept] = DECIDED
                asked, prices = (2 * targets).cpu(), (price.cpu(), weights.cpu())
                last = groups >= len(self._channels) or (temperature and number == schedule.rounds - 1)
                decided = self._channels[-1 if last else groups]
                if temperature:
                    expected = paths.expect(asked, (mean.cpu(), index.cpu()), prices, temperature)
                    current[..., kept:] = expected.to(current)[..., kept:] / 2
                if decided > kept or not temperature:
                    path, end = paths.choose(asked, prices).to(current) / 2, decided if temperature else None
                    current[..., kept:end] = path[..., kept:end]
                if decided > kept:
                    kept = decided
                    targets[..., :kept] = current[..., :kept]
            better = self._path_loss(states, parts, current, paths) < self._path_loss(states, parts, start, paths)
            return (2 * (current if better else start)).to(torch.int16)

    def _path_loss(self, states: list[RefineState], parts: list[slice], symbols: Tensor, paths: ChunkPaths) -> float:
        """Loss of the symbols of a chunk in bits."""
        loss = float(paths.bits((2 * symbols).cpu()))
        for part, state in zip(parts, states, strict=True):
            for window in windows(*symbols.shape[1:3]):
                with torch.no_grad():
                    outer = symbols[part, *window.outer]
                    residuals = state.residuals(self._decode(state, outer), window)
                    loss += float(state.loss(window, torch.zeros_like(outer), residuals).sum())
        return loss

    def _state(self, images: Tensor, steps: Tensor, quality: Tensor, tune: str) -> RefineState:
        step = steps.to(self.device).clone().float() * 2.0 ** -(formats.LATENT_BITS + formats.STEP_BITS)
        distortion = Distortion(images.to(self.device).clone(), tune)
        return RefineState(distortion, step, quality.to(self.device).clone().float())

    def _differentiated(self, state: RefineState, symbols: Tensor, window: Window) -> Costs:
        """Differentiate the loss of a window's core by its symbols."""
        symbols = symbols[:, *window.outer]
        latents = symbols.clone().requires_grad_()
        linear, magnitude = (t.detach().requires_grad_() for t in self._prior.features(symbols))
        decoded, (mean, index) = self._decode(state, latents), self._predict(state, linear, magnitude)
        residuals = state.residuals(decoded, window)
        bits = self._prior.bits(symbols, mean, index)
        new = window.number == state.measured
        (by_latent,) = torch.autograd.grad((total(residuals) * state.weight).sum(), latents, retain_graph=new)
        by_linear, by_magnitude = torch.autograd.grad(bits.sum(), (linear, magnitude))
        local = state.distortion.local[:, *window.inner]
        if new:
            state.measure(residuals, latents, window, local)
        core = (slice(None), *window.core)
        with torch.no_grad():
            unit = 2.0**-INPUT_BITS
            return Costs(
                state.loss(window, bits, residuals),
                symbols[core],
                mean[core].detach(),
                index[core].detach(),
                scale_of(index[core], self._prior.log_scales),
                (by_latent + by_linear * unit)[core],
                (by_magnitude * unit)[core],
                INTERFERENCE * state.weight[:, None, None, None] * state.curvature() * local,
            )

    def _loss(self, state: RefineState, symbols: Tensor) -> Tensor:
        """Loss (N,) in bits."""
        loss = torch.zeros_like(state.weight)
        with torch.no_grad():
            for window in windows(*symbols.shape[1:3]):
                part = symbols[:, *window.outer]
                bits = self._prior.bits(part, *self._predict(state, *self._prior.features(part)))
                loss += state.loss(window, bits, state.residuals(self._decode(state, part), window))
        return loss

    def _decode(self, state: RefineState, symbols: Tensor) -> Tensor:
        """Return pixels (N,H,W,3)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            latents = (symbols * state.step[:, None, None, :]).permute(0, 3, 1, 2)
            decoded: Tensor = self._synthesis(latents, state.quality).permute(0, 2, 3, 1)
        return decoded.float().clamp(0, 255)

    def _predict(self, state: RefineState, linear: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and scale index of each symbol."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            mean, index = self._prior.predict(linear, magnitude, state.quality)
        return mean.float(), index.float()


def _path_prices(states: list[RefineState]) -> Prices:
    """Return the prices of errors, for all images of a chunk."""
    curvature = torch.cat([state.weight[:, None] * state.curvature()[:, 0, 0] for state in states])  # of each image
    weights = torch.cat([state.distortion.local[..., 0] for state in states])
    return INTERFERENCE / 4 * curvature.mean(0), weights


def expected(
    symbols: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    by_magnitude: Tensor,
    curvature: Tensor,
    temperature: float,
) -> Tensor:
    """Expected values of symbols whose probabilities are exp(-cost / temperature); all tensors have one shape.

    Parameters
    ----------
    symbols : Tensor
        Point at which costs were differentiated; each may become the nearest integer or one of its neighbours.
    mean, scale : Tensor
        Parameters of the prior's logistic distributions.
    slope, by_magnitude : Tensor
        Derivatives of all costs but a symbol's own bits, by the symbol and by its companded magnitude.
    curvature : Tensor
        Half the second derivative.
    temperature : float
        Temperature in bits.
    """
    middle = torch.round(symbols)
    off = middle - symbols
    # relative to the mean, so that the tails of the logistic keep their precision
    away, inverse = (middle - mean).abs(), 1 / scale
    edges = [torch.sigmoid((-k - away) * inverse) for k in (-1.5, -0.5, 0.5, 1.5)]
    nearer, same, farther = (-torch.log2((a - b).clamp(min=1e-9)) for a, b in zip(edges[:-1], edges[1:], strict=True))
    below = middle < mean
    down, up = torch.where(below, farther, nearer), torch.where(below, nearer, farther)

    def added(move: float) -> Tensor:
        """Cost of a neighbour above that of the middle, without its own bits."""
        context = by_magnitude * (compand(middle + move) - compand(middle))
        return move * (slope + (2 * off + move) * curvature) + context

    costs = torch.stack([down + added(-1.0), same, up + added(1.0)])
    probabilities = torch.softmax(costs * (-1 / temperature), 0)
    return middle + probabilities[2] - probabilities[0]


def _pixels(latents: slice, end: int | None = None) -> slice:
    stop = latents.stop * LATENT_STRIDE
    return slice(latents.start * LATENT_STRIDE, stop if end is None else min(stop, end))
