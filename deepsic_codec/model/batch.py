"""Batches of chunks, and the interface of what runs a model over them; needs no torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.model.exact.formats import HUNDREDTHS, QUALITIES
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.payload.fields import Quantiser

DEFAULT_EFFORT = 1
DEFAULT_TUNE = "mse"
#: Quality from which on an effort takes symbols of a path through the trellis; below, it saves nothing.
TRELLIS_FROM = {1: 30.0, 2: 35.0, 3: 45.0, 4: 45.0}

Result = TypeVar("Result")
Pixels = NDArray[np.uint8] | NDArray[np.int16]
Shape = tuple[int, int, int]
"""Slices, height and width of a chunk, in pixels."""
Qualities = NDArray[np.float64]
"""Quality of each image of a batch, 1 to 100."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """One encoded chunk; results that were not requested are None.

    Attributes
    ----------
    grid : (int, int)
        Rows and columns of the symbols.
    quantiser : Quantiser
        Of the symbols.
    features : bytes or None
        The arithmetic-coded symbols.
    cells : ndarray or None
        uint8 (S, ceil(H/64), ceil(W/64), outputs) of each 64x64 pixel cell: scores in 1/255, the last of which is
        *unknown*, and the values of an embedding plus `EMBEDDING_ZERO`, if the head has any.
    symbols : ndarray or None
        int16 (S,h,w,C).
    pixels : ndarray or None
        (S,H,W,3) of the dtype of the images: the pixels that decoding the features gives.
    """

    grid: tuple[int, int]
    quantiser: Quantiser
    features: bytes | None = None
    cells: NDArray[np.uint8] | None = None
    symbols: NDArray[np.int16] | None = None
    pixels: Pixels | None = None


class Scheduler(Protocol):
    """Runs a model over batches of chunks. All methods may be called from any thread."""

    def encode(
        self,
        images: Sequence[Pixels],
        qualities: Sequence[float],
        efforts: Sequence[int] | None = None,
        tunes: Sequence[str] | None = None,
        *,
        features: bool = True,
        labels: bool = True,
        symbols: bool = False,
        pixels: bool = False,
        finish: Sequence[Callable[[Encoded], Any]] | None = None,
    ) -> list[Any]:
        """Encode chunks.

        Parameters
        ----------
        images : sequence of ndarray
            (S,H,W,3) for each chunk: uint8 grey levels, or int16 in 64ths of a grey level (0 to 16320). Shapes may
            differ; chunks of equal shape and dtype run as one batch.
        qualities : sequence of float
            1 to 100, one for each chunk.
        efforts : sequence of int, optional
            0 takes the nearest symbols, 1 (the default) optimises rate and distortion, 2 to 4 refine.
        tunes : sequence of str, optional
            Distortion that refinement lowers, as `distortion.py` names it.
        features, labels, symbols, pixels : bool
            Results to compute.
        finish : sequence of callable, optional
            The last function of each chunk. It takes an Encoded and runs on any thread, while others are encoded.

        Returns
        -------
        list
            For each chunk its Encoded, or the result of its last function.
        """

    def decode(
        self,
        features: Sequence[bytes],
        shapes: Sequence[Shape],
        quantisers: Sequence[Quantiser],
        q6: Sequence[bool] | None = None,
        finish: Sequence[Callable[[Pixels], Any]] | None = None,
    ) -> list[Any]:
        """Decode feature sections to pixels.

        Parameters
        ----------
        features : sequence of bytes
            The feature section of each chunk.
        shapes : sequence of (int, int, int)
            Slices, height and width of each chunk.
        quantisers : sequence of Quantiser
            One for each chunk.
        q6 : sequence of bool, optional
            Which chunks to return in 64ths of a grey level; none by default.
        finish : sequence of callable, optional
            The last function of each chunk. It takes the pixels and runs on any thread, while others are decoded.

        Returns
        -------
        list
            For each chunk (S,H,W,3), int16 (0 to 16320) with `q6`, else uint8, which may be a view of a larger array;
            or the result of its last function.

        Raises
        ------
        CorruptPayload
            If a stream cannot be decoded.
        """

    def decode_symbols(
        self, features: Sequence[bytes], shapes: Sequence[Shape], quantisers: Sequence[Quantiser]
    ) -> list[NDArray[np.int16]]:
        """Decode feature sections to symbols, int16 (S,C,h,w) for each chunk; parameters are those of `decode`."""

    def encode_symbols(
        self, symbols: Sequence[NDArray[np.int16]], shapes: Sequence[Shape], quantisers: Sequence[Quantiser]
    ) -> list[bytes]:
        """Encode symbols int16 (S,h,w,C) of chunks to feature sections."""

    def synthesise(
        self, symbols: Sequence[NDArray[np.int16]], shapes: Sequence[Shape], quantisers: Sequence[Quantiser], q6: bool
    ) -> list[Pixels]:
        """Reconstruct pixels (S,H,W,3) of chunks from symbols int16 (S,h,w,C), in 64ths of a grey level with `q6`."""

    def score(
        self, symbols: Sequence[NDArray[np.int16]], shapes: Sequence[Shape], quantisers: Sequence[Quantiser]
    ) -> list[NDArray[np.uint8]]:
        """Compute the cells of `Encoded` from symbols int16 (S,C,h,w) of chunks."""

    def dequantise(self, symbols: NDArray[np.int16], quantiser: Quantiser) -> NDArray[np.float32]:
        """Return the latents of symbols int16 (N,h,w,C) of one quantiser."""

    def map(self, function: Callable[..., Result], *columns: Iterable[Any]) -> list[Result]:
        """Apply a function of the host to each row of some columns, on several threads."""


def uses_trellis(effort: int, quality: float) -> bool:
    """Tell whether an effort takes symbols of a path through the trellis at this quality."""
    return quality >= TRELLIS_FROM.get(effort, np.inf)


def grid_of(shape: Shape) -> tuple[int, int]:
    """Return rows and columns of the symbols of a chunk."""
    return ceil_div(shape[1], LATENT_STRIDE), ceil_div(shape[2], LATENT_STRIDE)


def whole_qualities(quality: Qualities) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return qualities as hundredths, as payloads have them, and rounded to whole ones, (N,) each."""
    hundredths = np.floor(np.asarray(quality, np.float64) * HUNDREDTHS + 0.5).astype(np.int64)
    return hundredths, np.clip((hundredths + HUNDREDTHS // 2) // HUNDREDTHS, 1, QUALITIES)
