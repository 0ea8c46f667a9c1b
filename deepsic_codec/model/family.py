"""Protocols of a family of networks, through which the rest of the package uses it.

This module and `families` import no torch: what they know of a model suffices to check its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.model.architecture import Sizes
from deepsic_codec.model.file import Arrays
from deepsic_codec.model.schedule import Step
from deepsic_codec.model.tensors import Table

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from deepsic_codec.model.neighbours import Neighbours
    from deepsic_codec.model.ops.protocol import RateTables, SymbolState

#: Prefixes of tensor names in a model file, by part of the model.
ANALYSIS, RDO, GAINS, SYNTHESIS, HEAD = "encoder.analysis", "encoder.rdo", "decoder.gains", "decoder.synthesis", "head"
PRIOR = "decoder.prior"


@dataclass
class Analysed:
    """Latents (N,h,w,C) of a batch: float32 in units of the quantiser's step, and in a format for the semantic head."""

    scaled: Tensor
    latents: Tensor


class Transforms(Protocol):
    """Analysis, synthesis and semantic head of a loaded model on a device."""

    def analyse(self, images: Tensor, quality: NDArray[np.float64]) -> Analysed:
        """Images uint8 or int16 (N,H,W,3), H and W multiples of 16, at qualities (N,) -> latents."""

    def synthesise(
        self, symbols: NDArray[np.int16] | Tensor, quality: NDArray[np.float64], q6: bool, trellis: bool
    ) -> Tensor:
        """Symbols (N,h,w,C) -> uint8 (N,16h,16w,3), or int16 in 64ths of a grey level."""

    def latents(self, symbols: NDArray[np.int16], quality: NDArray[np.float64], trellis: bool) -> Tensor:
        """Symbols (N,h,w,C) -> latents for the semantic head."""

    def score(self, cells: Tensor, quality: NDArray[np.float64]) -> Tensor:
        """Cells of latents (N,h,w,C) at qualities (N,) -> uint8 (N,outputs).

        Scores in 1/255, and the values of an embedding, from -127 to 127, plus `EMBEDDING_ZERO`.
        """


class CodingPrior(Protocol):
    """Predicts mean and scale index of each symbol, step by step in coding order, in integers.

    Attributes
    ----------
    latents : int
        Channels of the symbols.
    device : str
        Where it computes.
    steps : list of Step
        The coding order.
    log_scales : Tensor
        Logarithms of the logistic scales (SCALES,) that indices stand for; for estimates, not for decoding.
    """

    latents: int
    device: str
    steps: list[Step]
    log_scales: Tensor

    def neighbours(self, symbols: Tensor, trellis: bool = False) -> Neighbours:
        """Features of symbols (N,h,w,C) that are all known."""

    def no_neighbours(self, images: int, grid: tuple[int, int], trellis: bool = False) -> Neighbours:
        """Features before the first step of decoding `images` grids of symbols."""

    def update(self, neighbours: Neighbours, step: Step, rows: Tensor, symbols: Tensor) -> None:
        """Enter the symbols (P,count) of a decoded step at its padded rows (P,), in place."""

    def run(self, number: int, neighbours: Neighbours, rows: Tensor, quality: Tensor | int) -> tuple[Tensor, Tensor]:
        """Means in eighths int16 and scale indices in quarters uint8, (P,count), of one step.

        `quality` holds the whole quality 1..100 of each row, int64 (P,), or is that of all rows.
        """

    def move_symbols(
        self,
        state: SymbolState,
        step: Step,
        rows: tuple[Tensor, Tensor],
        predicted: tuple[Tensor, Tensor],
        tables: RateTables,
        quality: Tensor | int,
    ) -> None:
        """Move symbols towards their means where that saves more bits than it costs (`Ops.move_symbols`)."""


class Family(Protocol):
    """A kind of model: its sizes, networks and stored form.

    Attributes
    ----------
    architecture : type of Sizes
        Its sizes, and its name.
    exact : bool
        Whether equal payloads give equal pixels on every machine.
    """

    architecture: type[Sizes]
    exact: bool

    def networks(self, arch: Any) -> dict[str, nn.Module]:
        """Networks that are trained and stored: `analysis`, `gains`, `synthesis`, `head`."""

    def tensors(self, arch: Any) -> Table:
        """Every tensor of a model file, from sizes alone: a file is compared with it before networks are made."""

    def check(self, arch: Any, arrays: Arrays) -> None:
        """Raise ValueError if tensors of a model file, each of which is in its range, do not fit together."""

    def prior(self, arch: Any, tensors: Mapping[str, Tensor], device: str) -> CodingPrior:
        """Prior of a model file, from its tensors below `PRIOR`."""

    def transforms(self, arch: Any, arrays: Arrays, device: torch.device) -> Transforms:
        """Transforms of a model file, from all of its arrays."""


def below(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Entries whose names start with a prefix and a dot, without them."""
    return {k[len(prefix) + 1 :]: v for k, v in arrays.items() if k.startswith(prefix + ".")}


def tensors_below(arrays: Arrays, prefix: str) -> dict[str, Tensor]:
    """Arrays of a model file below a prefix, as tensors that share their memory."""
    from torch import from_numpy

    return {k: from_numpy(v) for k, v in below(arrays, prefix).items()}
