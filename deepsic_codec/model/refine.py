"""Latent refinement: symbols chosen by the pixels that the decoder makes of them.

The optimised quantiser (`deepsic_codec.model.quantise`) decides symbol by symbol. Here the loss D + R / lambda of the
whole image is differentiated through the synthesis transform and through the contexts of the prior, several times, and
all symbols are chosen together. This takes many times the work of encoding, for fewer bits at the same quality; the bit
stream and the decoder do not depend on it (Yang, Bamler and Mandt 2020, "Improving Inference for Neural Image
Compression", explain why there is something to gain).

The method is mean-field annealing, not gradient descent on noisy latents as in that paper, which takes many more steps.
Every symbol is one of three neighbouring integers, with the probabilities exp(-cost / temperature) that their costs in
bits suggest; the image is decoded from the expected values of all symbols, which gives new costs; and the temperature
falls until each distribution has collapsed to one value.

Gradients are floating point: unlike with lower efforts, equal images may give payloads that differ by a few symbols on
other machines. Decoding is as exact as with any effort.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.distortion import Distortion, total
from deepsic_codec.model.exact import fixed
from deepsic_codec.model.exact.export import restore_network, restore_prior
from deepsic_codec.model.exact.prior import INPUT_BITS
from deepsic_codec.model.logistic import scale_of
from deepsic_codec.model.networks import Synthesis, step_lambda
from deepsic_codec.model.prior import Prior, compand
from deepsic_codec.model.quantise import UNIT
from deepsic_codec.payload.constants import LATENT_STRIDE

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """Number of rounds and temperatures of the annealing.

    Attributes
    ----------
    rounds : int
        How often the loss is differentiated.
    hot : float
        Temperature in the first round, in bits.
    pace : float
        Share of the way to what is expected that is gone in a round.  All symbols go at once, and those that
        overlap do the same work twice: at more than a half, they run away.
    inertia : float
        Share of the last round's step that is made again.
    """

    rounds: int
    hot: float
    pace: float
    inertia: float


#: By level of the encoder's effort; these and the other numbers below were tried on photographs.
SCHEDULES = {2: Schedule(3, 0.3, 0.3, 0.2), 3: Schedule(8, 1.0, 0.25, 0.5), 4: Schedule(24, 2.0, 0.25, 0.5)}
#: Temperature in the last round.
COLD = 0.2
#: Weight of the distortion against lambda of the nominal step, by quality: about as many bits as with effort 1.
TRADE_QUALITIES, TRADE = (20.0, 50.0), (0.9, 1.25)
#: What symbols that move at the same time add to each other's error, against what each of them would do alone.
INTERFERENCE = 1.2
#: What a symbol's error adds to that of the pixels, against an orthonormal transform, and how many latents' worth of
#: measuring that guess counts as: few where fine errors weigh less than coarse ones.
USUAL, USUAL_COUNT = 0.8, {"mse": 32, "ms-ssim": 2}
#: Edge of the windows that are differentiated at once, and what they see around it, in latents; gradients take some
#: hundred bytes a pixel.
WINDOW, HALO = 48, 6
SYMBOL_MAX = 32767


def trade(quality: Tensor) -> Tensor:
    """Bits that a squared error of one grey level is worth, by quality (N,)."""
    (low, high), (first, last) = TRADE_QUALITIES, TRADE
    share = ((quality - low) / (high - low)).clamp(0, 1)
    return (first + (last - first) * share) * step_lambda(quality) / 3  # three samples share a pixel's bits


@dataclass(frozen=True)
class _Window:
    """A window of the symbols of a batch.

    Attributes
    ----------
    number : int
        Which one.
    symbols : Tensor
        What it sees, (N,h,w,C).
    inner, outer : tuple of slice
        Rows and columns of latents that are its own, and of those that it sees.
    """

    number: int
    symbols: Tensor
    inner: tuple[slice, slice]
    outer: tuple[slice, slice]

    @property
    def own(self) -> tuple[slice, slice]:
        """Rows and columns of its own among those that it sees."""
        return _within(self.inner, self.outer)


class RefineState:
    """A batch: its distortion, dequantiser steps (N,C), qualities (N,), and its measured curvature."""

    def __init__(self, distortion: Distortion, step: Tensor, quality: Tensor) -> None:
        self.distortion, self.step, self.quality = distortion, step, quality
        self.weight = trade(quality)
        #: Windows of which the curvature has been measured, what was seen in them (N,1,1,C), and how much weighed it.
        self.measured = 0
        self._seen = self._weighed = torch.zeros((), device=step.device)

    def windows(self, symbols: Tensor) -> Iterator[_Window]:
        """Windows of symbols (N,h,w,C)."""
        for number, (inner, outer) in enumerate(_windows(symbols.shape[1], symbols.shape[2])):
            yield _Window(number, symbols[:, *outer], inner, outer)

    def residuals(self, decoded: Tensor, window: _Window) -> list[Tensor]:
        """Of a window's images (N,H,W,3), less what was padded to whole latents."""
        _, height, width, _ = self.distortion.images.shape
        rows, columns = (_pixels(latents, end) for latents, end in zip(window.outer, (height, width), strict=True))
        there = decoded[:, : rows.stop - rows.start, : columns.stop - columns.start]
        return self.distortion.residuals(there, rows, columns)

    def loss(self, window: _Window, bits: Tensor, residuals: list[Tensor]) -> Tensor:
        """Of a window's own latents (N,), from bits (N,h,w,C) and residuals of all that it sees."""
        rows, columns = (_pixels(latents) for latents in window.own)
        return bits[:, *window.own].sum((1, 2, 3)) + total(residuals, (rows, columns)) * self.weight

    def measure(self, residuals: list[Tensor], latents: Tensor, window: _Window, local: Tensor) -> None:
        """Take in what a window's own latents do to residuals, which are differentiated once more.

        The squared gradient of a sum with random signs is on average that of all residuals (Hutchinson's estimate of a
        diagonal).
        """
        chance = torch.Generator().manual_seed(window.number)  # the same for every image, whatever else is in its batch
        parts = []
        for part in residuals:
            signs = torch.randint(0, 2, part.shape[1:], generator=chance).to(part) * 2 - 1
            parts.append((part * signs).sum())
        (slope,) = torch.autograd.grad(torch.stack(parts).sum(), latents)
        self._seen = self._seen + slope[:, *window.own].square().sum((1, 2), keepdim=True)
        self._weighed = self._weighed + local.sum((1, 2), keepdim=True)
        self.measured += 1

    def curvature(self) -> Tensor:
        """Distortion that a symbol off by one adds where errors weigh one, (N,1,1,C), by the windows measured."""
        guessed = USUAL_COUNT[self.distortion.tune] * self.distortion.local.mean((1, 2), keepdim=True)
        guess = USUAL * (self.step[:, None, None, :] * UNIT) ** 2
        return (self._seen + guessed * guess) / (self._weighed + guessed)


class Refiner:
    """The decoder of a model file in differentiable form.

    Parameters
    ----------
    arch : Architecture
        Of an integer model.
    synthesis : dict of str to Tensor
        Of the synthesis transform, as a model file has them.
    prior : dict of str to Tensor
        Of its prior.
    device : torch.device
        Where to compute.
    bf16 : bool
        Whether to multiply matrices in bfloat16.
    """

    def __init__(
        self, arch: Architecture, synthesis: Tensors, prior: Tensors, device: torch.device, bf16: bool
    ) -> None:
        self._synthesis, self._prior = Synthesis(arch), Prior(arch)
        restore_network(self._synthesis, synthesis)
        restore_prior(self._prior, prior)
        self._synthesis.bounded = True  # as the integers are: without it, single images run away
        for net in (self._synthesis, self._prior):
            net.requires_grad_(False).eval().to(device)
        self.device, self.bf16 = device, bf16

    def refine(
        self, images: Tensor, symbols: Tensor, steps: Tensor, quality: Tensor, schedule: Schedule, tune: str = "mse"
    ) -> Tensor:
        """Improve the symbols of a batch of images.

        Parameters
        ----------
        images : Tensor
            Grey levels float32 (N,H,W,3).
        symbols : Tensor
            int32 (N,h,w,C), the optimised quantiser's. No image becomes worse than it is with them.
        steps : Tensor
            Dequantiser steps int32 (N,C), in 2^-STEP_BITS units of integer latents.
        quality : Tensor
            Whole qualities, int64 (N,).
        schedule : Schedule
            How long to take.
        tune : str
            What is to be small: `"mse"`, squared errors, or `"ms-ssim"`, what MS-SSIM sees of them.

        Returns
        -------
        Tensor
            int32 (N,h,w,C).
        """
        with torch.inference_mode(False):  # whose tensors autograd refuses
            step = steps.to(self.device).clone().float() * 2.0 ** -(fixed.LATENT_BITS + fixed.STEP_BITS)
            distortion = Distortion(images.to(self.device).clone(), tune)
            state = RefineState(distortion, step, quality.to(self.device).clone().float())
            start = symbols.to(self.device, torch.float32).clone()
            found, moved, least = start, torch.zeros_like(start), torch.zeros_like(state.weight)
            for number in range(schedule.rounds):
                temperature = schedule.hot * (COLD / schedule.hot) ** (number / max(1, schedule.rounds - 1))
                wanted = torch.empty_like(found)
                for window in state.windows(found):
                    loss, wanted[:, *window.inner] = self._expected(state, window, temperature)
                    if number == 0:
                        least += loss
                moved = schedule.inertia * moved + schedule.pace * (wanted - found)
                found = (found + moved).clamp_(-SYMBOL_MAX, SYMBOL_MAX)
            found = torch.round(found)
            better = self._loss(state, found) < least
            return torch.where(better[:, None, None, None], found, start).to(torch.int32)

    def _expected(self, state: RefineState, window: _Window, temperature: float) -> tuple[Tensor, Tensor]:
        """Loss (N,) in bits of a window's own symbols as they are, and what is to be expected of them, (N,h,w,C)."""
        latents = window.symbols.clone().requires_grad_()
        linear, magnitude = (t.detach().requires_grad_() for t in self._prior.features(window.symbols))
        decoded, mean, index = self._decode(state, latents, linear, magnitude)
        residuals = state.residuals(decoded, window)
        bits = self._prior.bits(window.symbols, mean, index)
        new = window.number == state.measured
        (by_latent,) = torch.autograd.grad((total(residuals) * state.weight).sum(), latents, retain_graph=new)
        by_linear, by_magnitude = torch.autograd.grad(bits.sum(), (linear, magnitude))
        local = state.distortion.local[:, *window.inner]
        if new:
            state.measure(residuals, latents, window, local)
        own = (slice(None), *window.own)
        with torch.no_grad():
            unit = 2.0**-INPUT_BITS
            slope, by_magnitude = (by_latent + by_linear * unit)[own], (by_magnitude * unit)[own]
            scale = scale_of(index[own], self._prior.log_scales)
            curvature = INTERFERENCE * state.weight[:, None, None, None] * state.curvature() * local
            wanted = expected(window.symbols[own], mean[own], scale, slope, by_magnitude, curvature, temperature)
            return state.loss(window, bits, residuals), wanted

    def _loss(self, state: RefineState, symbols: Tensor) -> Tensor:
        """Loss (N,) in bits."""
        found = torch.zeros_like(state.weight)
        with torch.no_grad():
            for window in state.windows(symbols):
                decoded, mean, index = self._decode(state, window.symbols, *self._prior.features(window.symbols))
                bits = self._prior.bits(window.symbols, mean, index)
                found += state.loss(window, bits, state.residuals(decoded, window))
        return found

    def _decode(
        self, state: RefineState, symbols: Tensor, linear: Tensor, magnitude: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (N,H,W,3), and mean and scale index of each symbol under its features."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            latents = (symbols * state.step[:, None, None, :]).permute(0, 3, 1, 2)
            decoded = self._synthesis(latents, state.quality).permute(0, 2, 3, 1)
            mean, index = self._prior.predict(linear, magnitude, state.quality)
        return decoded.float().clamp(0, 255), mean.float(), index.float()


def expected(
    symbols: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    by_magnitude: Tensor,
    curvature: Tensor,
    temperature: float,
) -> Tensor:
    """What to expect of symbols that are drawn with probabilities exp(-cost / temperature).

    Parameters
    ----------
    symbols : Tensor
        Where costs were differentiated, any shape; each may become the nearest integer or one of its neighbours.
    mean, scale : Tensor
        Of the prior's logistic distributions.
    slope, by_magnitude : Tensor
        Derivatives of everything but a symbol's own bits, by the symbol and by its companded magnitude.
    curvature : Tensor
        Half the second derivative.
    temperature : float
        Temperature in bits.

    Returns
    -------
    Tensor
        Of the shape of `symbols`.
    """
    middle = torch.round(symbols)
    off = middle - symbols
    # seen from the mean, so that the tails of the logistic keep their precision
    away, inverse = (middle - mean).abs(), 1 / scale
    edges = [torch.sigmoid((-k - away) * inverse) for k in (-1.5, -0.5, 0.5, 1.5)]
    nearer, same, farther = (-torch.log2((a - b).clamp(min=1e-9)) for a, b in zip(edges[:-1], edges[1:], strict=True))
    below = middle < mean
    down, up = torch.where(below, farther, nearer), torch.where(below, nearer, farther)

    def rest(move: float) -> Tensor:
        """What a neighbour costs more than the middle but for its own bits."""
        context = by_magnitude * (compand(middle + move) - compand(middle))
        return move * (slope + (2 * off + move) * curvature) + context

    costs = torch.stack([down + rest(-1.0), same, up + rest(1.0)])
    chances = torch.softmax(costs * (-1 / temperature), 0)
    return middle + chances[2] - chances[0]


def _windows(height: int, width: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Windows that share out a grid of latents, and each with what it sees."""
    for y in range(0, height, WINDOW):
        for x in range(0, width, WINDOW):
            inner = slice(y, min(y + WINDOW, height)), slice(x, min(x + WINDOW, width))
            ends = (height, width)
            outer = [slice(max(0, i.start - HALO), min(end, i.stop + HALO)) for i, end in zip(inner, ends, strict=True)]
            yield inner, (outer[0], outer[1])


def _pixels(latents: slice, end: int | None = None) -> slice:
    stop = latents.stop * LATENT_STRIDE
    return slice(latents.start * LATENT_STRIDE, stop if end is None else min(stop, end))


def _within(inner: tuple[slice, slice], outer: tuple[slice, slice]) -> tuple[slice, slice]:
    rows, columns = (slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
    return rows, columns
