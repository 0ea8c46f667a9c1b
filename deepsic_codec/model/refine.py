"""Latent refinement: symbols chosen by what the decoder makes of them.

The optimised quantiser (:mod:`deepsic_codec.model.rdo`) takes each symbol for itself. Here
the loss D + R / lambda of the whole image is differentiated through the synthesis transform
and through the contexts of the prior, and every symbol may move by one wherever that is
expected to lower it; then the loss is differentiated again. Many times the work of
encoding, for fewer bits at the same quality; the bit stream and the decoder know nothing of
it (latent refinement as in Yang, Bamler and Mandt 2020, "Improving Inference for Neural
Image Compression", but on whole symbols from the start).

Gradients are floating point: unlike with lower efforts, equal images may give payloads that
differ by a few symbols on other machines. Decoding is as exact as ever.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepsic_codec.model import fixed
from deepsic_codec.model.networks import STRIDE, Architecture, Synthesis, step_lambda
from deepsic_codec.model.prior import INPUT_BITS, Prior, compand
from deepsic_codec.model.rdo import UNIT
from deepsic_codec.model.restore import restore_prior, restore_transform

Tensors = dict[str, Tensor]

#: Rounds by level of the encoder's effort.
ROUNDS = {2: 3, 3: 8, 4: 24}
#: Weight of the distortion against lambda of the nominal step; 1 to 2 were tried on photographs, 1.2 was best over all
#: qualities. Contexts are in the gradient here: the quantiser that takes them for granted wants more.
TRADE = 1.2
#: Shares of the moves that look worthwhile which are made in the first and in the last round.  Made all at once,
#: neighbours undo each other's work.
FIRST_SHARE, LAST_SHARE = 0.5, 0.12
#: Edge of the windows that are differentiated at once, and what they see around it, in latents; gradients take some
#: hundred bytes a pixel.
WINDOW, HALO = 48, 6
SYMBOL_MAX = 32767


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
        restore_transform(self._synthesis, synthesis)
        restore_prior(self._prior, prior)
        self._synthesis.bounded = True  # as the integers are: without it, single images run away
        for net in (self._synthesis, self._prior):
            net.requires_grad_(False).eval().to(device)
        self.device, self.bf16 = device, bf16

    def refine(self, images: Tensor, symbols: Tensor, steps: Tensor, quality: Tensor, rounds: int) -> Tensor:
        """Improve the symbols of a batch of images.

        Parameters
        ----------
        images : Tensor
            Grey levels float32 (N,H,W,3).
        symbols : Tensor
            int32 (N,h,w,C), of which none becomes worse.
        steps : Tensor
            Dequantiser steps int32 (N,C), in 2^-STEP_BITS units of integer latents.
        quality : Tensor
            Whole qualities, int64 (N,).
        rounds : int
            How often to differentiate.

        Returns
        -------
        Tensor
            int32 (N,h,w,C).
        """
        with torch.inference_mode(False):  # whose tensors autograd refuses
            images, found = images.to(self.device).clone(), symbols.to(self.device, torch.float32).clone()
            step = steps.to(self.device).clone().float() * 2.0 ** -(fixed.LATENT_BITS + fixed.STEP_BITS)
            quality = quality.to(self.device).clone().float()
            best, least = found, torch.full((len(found),), torch.inf, device=self.device)
            chance = torch.Generator().manual_seed(0)  # the same for every image, whatever else is in its batch
            for number in range(rounds + 1):
                last = number == rounds
                share = FIRST_SHARE + (LAST_SHARE - FIRST_SHARE) * number / max(1, rounds - 1)
                chosen = (torch.rand(found.shape[1:], generator=chance) < share).to(self.device)
                loss, moved = torch.zeros_like(least), found.clone()
                for inner, outer in _windows(found.shape[1], found.shape[2]):
                    pixels, part = images[:, _pixels(outer[0]), _pixels(outer[1])], found[:, outer[0], outer[1]]
                    value, move = self._moves(pixels, part, step, quality, _within(inner, outer), not last)
                    loss += value
                    if move is not None:
                        moved[:, inner[0], inner[1]] += move * chosen[inner]
                better = loss < least
                least = torch.where(better, loss, least)
                best = torch.where(better[:, None, None, None], found, best)
                found = moved.clamp_(-SYMBOL_MAX, SYMBOL_MAX)
            return best.to(torch.int32)

    def _moves(
        self, pixels: Tensor, symbols: Tensor, step: Tensor, quality: Tensor, own: tuple[slice, slice],
        differentiate: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Loss (N,) in bits of a window's own latents, and for each of these -1, 0 or 1 (N,h,w,C)."""
        weight = TRADE * step_lambda(quality)[:, None, None, None] / 3  # three samples share a pixel's bits
        trial = symbols.clone().requires_grad_(differentiate)
        linear, magnitude = (t.detach().requires_grad_(differentiate) for t in self._prior.features(symbols))
        with (
            torch.set_grad_enabled(differentiate),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            latents = (trial * step[:, None, None, :]).permute(0, 3, 1, 2)
            decoded = self._synthesis(latents, quality).permute(0, 2, 3, 1)
            mean, index = self._prior.predict(linear, magnitude, quality)
        with torch.set_grad_enabled(differentiate):
            # what was padded to whole latents has no pixels
            error = (decoded[:, : pixels.shape[1], : pixels.shape[2]].float() - pixels).square()
            mean, index = mean.float(), index.float()
            bits = self._prior.bits(symbols, mean, index)
            wanted = (error.sum((1, 2, 3)) * weight[:, 0, 0, 0]).sum()
            if differentiate:
                (slope,) = torch.autograd.grad(wanted, trial)
                by_linear, by_magnitude = torch.autograd.grad(bits.sum(), (linear, magnitude))
        with torch.no_grad():
            rows, columns = own
            loss = bits[:, rows, columns].sum((1, 2, 3))
            loss += error[:, _pixels(rows), _pixels(columns)].sum((1, 2, 3)) * weight[:, 0, 0, 0]
            if not differentiate:
                return loss, None
            curvature = weight * (step[:, None, None, :] * UNIT) ** 2  # as of an orthonormal transform
            down, up = (
                self._prior.bits(symbols + move, mean, index) - bits + move * slope + curvature
                + self._context(symbols, move, by_linear, by_magnitude)
                for move in (-1.0, 1.0)
            )  # fmt: skip
            move = torch.where(down < up, -1.0, 1.0) * (torch.minimum(down, up) < 0)
            return loss, move[:, rows, columns]

    def _context(self, symbols: Tensor, move: float, by_linear: Tensor, by_magnitude: Tensor) -> Tensor:
        """Bits that other symbols will cost more because a context of theirs changes."""
        unit = 2.0**-INPUT_BITS
        return by_linear * (move * unit) + by_magnitude * (compand(symbols + move) - compand(symbols)) * unit


def _windows(height: int, width: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Windows that share out a grid of latents, and each with what it sees."""
    for y in range(0, height, WINDOW):
        for x in range(0, width, WINDOW):
            inner = slice(y, min(y + WINDOW, height)), slice(x, min(x + WINDOW, width))
            ends = (height, width)
            outer = [slice(max(0, i.start - HALO), min(end, i.stop + HALO)) for i, end in zip(inner, ends, strict=True)]
            yield inner, (outer[0], outer[1])


def _pixels(latents: slice) -> slice:
    return slice(latents.start * STRIDE, latents.stop * STRIDE)


def _within(inner: tuple[slice, slice], outer: tuple[slice, slice]) -> tuple[slice, slice]:
    rows, columns = (slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
    return rows, columns
