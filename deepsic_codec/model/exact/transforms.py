"""The networks of a model file on a device: images to latents in quantiser steps, to label scores, and back.

Two kinds with one interface: integers (:class:`IntegerTransforms`), which give the same
result everywhere, and float networks (:class:`FloatTransforms`), which round differently on
different machines: the paper's own networks, and models from before integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepsic_codec import config
from deepsic_codec.model.architecture import AnyArchitecture, stored_networks
from deepsic_codec.model.device import upload
from deepsic_codec.model.exact import fixed
from deepsic_codec.model.exact.integer import (
    IntegerAnalysis,
    IntegerGains,
    IntegerHead,
    IntegerSynthesis,
    dequantise,
    in_steps,
)
from deepsic_codec.model.file import Arrays
from deepsic_codec.model.networks import Architecture

#: Units per grey level of images in int16.
FINE = 1 << fixed.PIXEL_BITS

Pixels = NDArray[np.uint8] | NDArray[np.int16]
#: Where the encoder's, decoder's and head's tensors are in a model file.
ANALYSIS, RDO, GAINS, SYNTHESIS, HEAD = "encoder.analysis", "encoder.rdo", "decoder.gains", "decoder.synthesis", "head"
PRIOR = "decoder.prior"


@dataclass
class Analysed:
    """What the analysis transform made of a batch.

    Attributes
    ----------
    scaled : Tensor
        Latents in quantiser steps, float32 (N,h,w,C).
    latents : Tensor
        Latents for the semantic head, (N,h,w,C), as this kind of transforms has them.
    """

    scaled: Tensor
    latents: Tensor


class Transforms(Protocol):
    """What a runtime asks of either kind."""

    #: Whether equal payloads give equal pixels on every machine.
    exact: bool

    def analyse(self, images: Tensor, quality: NDArray[np.float64]) -> Analysed:
        """Images uint8 or int16 (N,H,W,3), of whole latents, at qualities (N,)."""

    def synthesise(self, symbols: NDArray[np.int16] | Tensor, quality: NDArray[np.float64], fine: bool) -> Tensor:
        """Symbols (N,h,w,C) -> uint8 (N,16h,16w,3), or int16 in 64ths of a grey level."""

    def latents(self, symbols: NDArray[np.int16], quality: NDArray[np.float64]) -> Tensor:
        """Symbols (N,h,w,C) -> latents for the semantic head."""

    def score(self, cells: Tensor, quality: NDArray[np.float64]) -> Tensor:
        """Cells of latents (N,h,w,C) at qualities (N,) -> scores uint8 (N,classes) in 1/255."""


class IntegerTransforms:
    """Transforms in integers."""

    exact = True

    def __init__(self, arch: Architecture, arrays: Arrays, device: torch.device) -> None:
        def tensors(prefix: str) -> dict[str, Tensor]:
            return {k: torch.from_numpy(v) for k, v in below(arrays, prefix).items()}

        self.device = device
        self._analysis = IntegerAnalysis(arch, tensors(ANALYSIS), device)
        self._synthesis = IntegerSynthesis(arch, tensors(SYNTHESIS), device)
        self._gains = IntegerGains(tensors(GAINS), torch.device("cpu"))
        self._head = IntegerHead(arch, tensors(HEAD), device)

    def analyse(self, images: Tensor, quality: NDArray[np.float64]) -> Analysed:
        """See :class:`Transforms`."""
        whole, steps = self._qualities(quality)
        x = upload(images, self.device)
        rest = None
        if x.dtype == torch.int16:
            grey = (x + FINE // 2) >> fixed.PIXEL_BITS
            rest = (x - (grey << fixed.PIXEL_BITS)).to(torch.int8)
            grey = (grey - 128).to(torch.int8)
        else:
            grey = x.bitwise_xor(128).view(torch.int8)
        found = self._analysis(grey, rest, whole)
        return Analysed(in_steps(found, steps), found)

    def synthesise(self, symbols: NDArray[np.int16] | Tensor, quality: NDArray[np.float64], fine: bool) -> Tensor:
        """See :class:`Transforms`."""
        whole, steps = self._qualities(quality)
        return self._synthesis(dequantise(upload(symbols, self.device), steps), whole, fine)

    def latents(self, symbols: NDArray[np.int16], quality: NDArray[np.float64]) -> Tensor:
        """See :class:`Transforms`."""
        _, steps = self._qualities(quality)
        return dequantise(upload(symbols, self.device), steps)

    def score(self, cells: Tensor, quality: NDArray[np.float64]) -> Tensor:
        """See :class:`Transforms`."""
        return self._head(cells, upload(whole_qualities(quality)[1], self.device))

    def steps(self, quality: NDArray[np.float64]) -> Tensor:
        """Dequantiser steps int32 (N,C)."""
        return self._qualities(quality)[1]

    def _qualities(self, quality: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Whole qualities (N,) and quantiser steps (N,C)."""
        hundredths, whole = whole_qualities(quality)
        return upload(whole, self.device), upload(self._gains.steps(hundredths), self.device)


class FloatTransforms(nn.Module):
    """Transforms in floating point."""

    exact = False
    analysis: nn.Module
    gains: nn.Module
    synthesis: nn.Module
    head: nn.Module

    def __init__(self, arch: AnyArchitecture, arrays: Arrays, device: torch.device) -> None:
        super().__init__()
        self.device = device
        networks = stored_networks(arch)
        for name, prefix in (("analysis", ANALYSIS), ("gains", GAINS), ("synthesis", SYNTHESIS), ("head", HEAD)):
            self.add_module(name, load_weights(networks[name], arrays, prefix))
        self.requires_grad_(False).eval().to(device)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def analyse(self, images: Tensor, quality: NDArray[np.float64]) -> Analysed:
        """See :class:`Transforms`."""
        q = self._quality(quality)
        x = upload(images, self.device).permute(0, 3, 1, 2).float()
        x = x / FINE if images.dtype == torch.int16 else x
        with torch.autocast(self.device.type, torch.bfloat16, enabled=analyses_in_bfloat16(self.device)):
            y = self.analysis(x, q).float()
        gain = self.gains(q)
        return Analysed((y * gain).permute(0, 2, 3, 1), y.permute(0, 2, 3, 1))

    def synthesise(self, symbols: NDArray[np.int16] | Tensor, quality: NDArray[np.float64], fine: bool) -> Tensor:
        """See :class:`Transforms`."""
        q, unit = self._quality(quality), FINE if fine else 1
        y = upload(symbols, self.device).permute(0, 3, 1, 2).float() / self.gains(q)
        x = self.synthesis(y, q)
        x = (x * unit + 0.5).clamp_(0, 255 * unit)  # truncation after + 1/2 rounds
        return x.to(torch.int16 if fine else torch.uint8).permute(0, 2, 3, 1)

    def latents(self, symbols: NDArray[np.int16], quality: NDArray[np.float64]) -> Tensor:
        """See :class:`Transforms`."""
        gain = self.gains(self._quality(quality)).permute(0, 2, 3, 1)
        return upload(symbols, self.device).float() / gain

    def score(self, cells: Tensor, quality: NDArray[np.float64]) -> Tensor:
        """See :class:`Transforms`."""
        logits = self.head(cells.permute(0, 3, 1, 2), self._quality(quality))
        return torch.round(torch.sigmoid(logits) * 255).to(torch.uint8)

    def _quality(self, quality: Sequence[float] | NDArray[np.float64]) -> Tensor:
        return upload(torch.tensor(quality, dtype=torch.float32), self.device)


def analyses_in_bfloat16(device: torch.device) -> bool:
    """Whether to run a floating-point analysis in bfloat16: symbols near a tie may fall otherwise, nothing else."""
    return _bfloat16(device, "_is_amx_tile_supported")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32 there."""
    return _bfloat16(device, "_is_avx512_bf16_supported")


def _bfloat16(device: torch.device, test: str) -> bool:
    """What the process is set to; "auto" asks this function of torch.cpu, which older versions lack."""
    wanted = config.get().precision
    if wanted == "auto":
        return device.type == "cuda" or bool(getattr(torch.cpu, test, lambda: False)())
    return wanted == "bfloat16"


def grey_levels(images: Tensor) -> Tensor:
    """Images as the codec has them -> grey levels, float32."""
    return images.float() / (FINE if images.dtype == torch.int16 else 1)


def whole_qualities(quality: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Qualities as hundredths, as payloads have them, and rounded to whole ones, int64 (N,)."""
    hundredths = torch.from_numpy(np.floor(np.asarray(quality, np.float64) * 100 + 0.5).astype(np.int64))
    return hundredths, ((hundredths + 50) // 100).clamp(1, 100)


def make_transforms(arch: AnyArchitecture, arrays: Arrays, device: torch.device) -> Transforms:
    """Transforms of a model file of the kind that its architecture says."""
    if isinstance(arch, Architecture) and arch.integer:
        return IntegerTransforms(arch, arrays, device)
    return FloatTransforms(arch, arrays, device)


def below(arrays: Arrays, prefix: str) -> Arrays:
    """Arrays whose names start with a prefix and a dot, without them."""
    return {k[len(prefix) + 1 :]: v for k, v in arrays.items() if k.startswith(prefix + ".")}


def load_weights(network: Any, arrays: Arrays, prefix: str) -> nn.Module:
    """Give a network its float weights from the arrays of a model file."""
    network.load_state_dict({k: torch.from_numpy(v).float() for k, v in below(arrays, prefix).items()})
    return network
