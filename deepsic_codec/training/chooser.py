"""Symbols as the encoder chooses them at its default effort, for training on what payloads hold."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepsic_codec.model.batch import DEFAULT_EFFORT, uses_trellis
from deepsic_codec.model.cpu.prior import Prior
from deepsic_codec.model.cpu.trellis import odd_states
from deepsic_codec.model.exact.export import export_gains
from deepsic_codec.model.exact.formats import HUNDREDTHS, LATENT_BITS, TRELLIS_STEP, WIDE_MAX
from deepsic_codec.model.exact.transforms import IntegerGains
from deepsic_codec.model.ops.protocol import RateTables
from deepsic_codec.model.quantise import load_tables, make_tables, quantise
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.coders.symbols import SYMBOL_MAX
from deepsic_codec.training.loss import Networks


class Chosen(NamedTuple):
    """Symbols int16 (B,C,h,w), and whether those of an image are of a path through the trellis, bool (B,)."""

    symbols: Tensor
    trellis: Tensor


class Chooser:
    """Chooses the symbols of latents with an integer prior.

    Parameters
    ----------
    nets : Networks
        Their gains make the steps.
    prior : dict of str to Tensor
        Tensors of the integer prior.
    tables : CoderTables, optional
        The coder's tables, which give the rates of paths through the trellis; without them there are no such paths.
    device : str
        That of latents and symbols.
    """

    def __init__(self, nets: Networks, prior: dict[str, Tensor], tables: CoderTables | None, device: str) -> None:
        self._nets, self._prior, self._paths = nets, nets.integer_prior(prior, device), None
        self._rates: RateTables | None = None  # rounds to the nearest
        if nets.stores_integers:
            gains = export_gains(nets.gains)
            rates = make_tables(self._prior.log_scales, gains["step"])
            self._rates = load_tables(rates, device)
            self._gains = IntegerGains(gains, torch.device("cpu"))
            if tables is not None:
                of_prior, of_rates, of_gains = (
                    {name: tensor.cpu().numpy() for name, tensor in part.items()} for part in (prior, rates, gains)
                )
                self._paths = Prior(nets.arch, of_prior, of_rates, of_gains, tables)

    @torch.no_grad()
    def __call__(self, latents: Tensor, quality: Tensor) -> Chosen:
        """Choose the symbols of latents (B,C,h,w) at qualities (B,)."""
        scaled = (latents * self._nets.gains(quality)).clamp(-SYMBOL_MAX, SYMBOL_MAX).permute(0, 2, 3, 1).contiguous()
        rounded = torch.floor(quality + 0.5).clamp(1, 100).long()
        symbols = quantise(self._prior, self._rates, scaled, rounded)[0].permute(0, 3, 1, 2).to(torch.int16)
        trellis = [self._paths is not None and uses_trellis(DEFAULT_EFFORT, q) for q in quality.tolist()]
        for image in np.flatnonzero(trellis):
            symbols[image] = self._path(latents[image], quality[image], int(rounded[image])).to(symbols.device)
        return Chosen(symbols, torch.tensor(trellis, device=symbols.device))

    def _path(self, latents: Tensor, quality: Tensor, rounded: int) -> Tensor:
        assert self._paths is not None
        integers = torch.floor(latents * 2.0**LATENT_BITS + 0.5).clamp(-WIDE_MAX, WIDE_MAX)
        channels_last = integers.permute(1, 2, 0)[None].to(torch.int32).contiguous().cpu().numpy()
        hundredths = torch.floor(quality.cpu() * HUNDREDTHS + 0.5).long()
        steps = self._gains.steps(hundredths[None], True)[0].numpy()
        symbols, _ = self._paths.choose(channels_last, steps, rounded, True, False, True)
        return torch.from_numpy(symbols[0]).permute(2, 0, 1)

    @torch.no_grad()
    def stored(self, latents: Tensor, quality: Tensor) -> Tensor:
        """Return the latents (B,C,h,w) that decoding gives."""
        symbols, trellis = self(latents, quality)
        return symbols * steps_of(trellis) / self._nets.gains(quality)


def steps_of(trellis: Tensor) -> Tensor:
    """Return the steps of symbols, in units of the scalar quantiser's, (B,1,1,1)."""
    return torch.where(trellis, TRELLIS_STEP / 2, 1.0)[:, None, None, None]


def bits_of(prior: Any, chosen: Chosen, quality: Tensor) -> Tensor:
    """Return the bits (B,) of symbols under the prior of networks, which imitates its integer form."""
    symbols, trellis = chosen
    if not trellis.any():
        values = symbols.float()
        bits: Tensor = prior.bits(values, *prior(values, quality, True))
        return bits.sum((1, 2, 3))
    odd = torch.zeros(symbols.shape, dtype=torch.bool)
    for image in np.flatnonzero(trellis.cpu().numpy()):
        channels_last = symbols[image].permute(1, 2, 0)[None].contiguous().cpu().numpy()
        odd[image] = torch.from_numpy(odd_states(prior.steps, channels_last)[0]).permute(2, 0, 1)
    bits = prior.symbol_bits(symbols.float(), quality, trellis, odd.to(symbols.device))
    return bits.sum((1, 2, 3))
