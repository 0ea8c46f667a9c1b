"""A model that is loaded on a device: five functions, each on one batch of equal shape.

analyse     images to latents
choose      latents to symbols: nearest, optimised for rate and distortion, or refined
synthesise  symbols to pixels
code        symbols to feature sections, and back
score       latents to label scores

`deepsic_codec.model.torch_scheduler` runs them over whole batches.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec.axes import ceil_div
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.batch import DEFAULT_EFFORT, DEFAULT_TUNE, Qualities, Shape, grid_of, whole_qualities
from deepsic_codec.model.coding import decode_symbols, start_decoding, start_encoding, whole_quality
from deepsic_codec.model.cpu.prior import Prior as PathPrior
from deepsic_codec.model.device import high_priority_stream, side_stream, synchronize
from deepsic_codec.model.device_coder.coder import DeviceCoder, device_coder_for
from deepsic_codec.model.exact.transforms import IntegerTransforms, grey_levels, multiplies_bfloat16
from deepsic_codec.model.families import family_of, load_checked
from deepsic_codec.model.family import GAINS, PRIOR, RDO, SYNTHESIS, Analysed, below, tensors_below
from deepsic_codec.model.file import ModelInfo
from deepsic_codec.model.neighbours import Predictions
from deepsic_codec.model.paths import ChunkPaths
from deepsic_codec.model.quantise import load_tables, quantise
from deepsic_codec.model.refine import PATH_SCHEDULES, SCHEDULES, Refiner
from deepsic_codec.model.threads import Pending
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.coders.symbols import SYMBOL_MAX
from deepsic_codec.payload.constants import LABEL_CELL, LATENT_STRIDE

# Pixels that are refined at a time: gradients take over a hundred times as many bytes.
REFINE_PIXELS = 1 << 22


@dataclass(frozen=True, eq=False)
class Chosen:
    """Symbols of a batch, int16 (N,h,w,C).

    Attributes
    ----------
    symbols : Tensor
    predictions : Predictions, optional
        The prior's predictions of them, if choosing them computed these.
    trellis : bool
        Whether they are those of paths through the trellis.
    features : list of bytes, optional
        Their feature sections, by chunk, if choosing them made these.
    """

    symbols: Tensor
    predictions: Predictions | None = None
    trellis: bool = False
    features: list[bytes] | None = None


class LoadedModel:
    """A model, loaded on a torch device. All methods may be called from any thread.

    Raises
    ------
    ModelMismatch
        If the file is damaged, altered, or does not fit its own description.
    """

    def __init__(self, info: ModelInfo, device: str = "cpu") -> None:
        self.info = info
        self.device = torch.device(device)
        self.arch, arrays = load_checked(info)
        self.family = family_of(self.arch)
        self.transforms = self.family.transforms(self.arch, arrays, self.device)
        self.prior = self.family.prior(self.arch, tensors_below(arrays, PRIOR), str(self.device))
        rdo = tensors_below(arrays, RDO)
        self._rate_tables = load_tables(rdo, self.device) if rdo else None
        self.coder_tables = CoderTables.from_arrays(below(arrays, "decoder.coder"))
        self._refiner: Refiner | None = None
        self._path_prior: PathPrior | None = None
        self._device_coder: DeviceCoder | None = None
        self._device_coder_tried = False
        self._on_first_use = threading.Lock()
        synchronize(self.device)

    @property
    def exact(self) -> bool:
        """Whether equal payloads give equal pixels on every machine: the synthesis computes in integers."""
        return self.family.exact

    def analyse(self, images: Tensor, quality: Qualities) -> Analysed:
        """Transform images to latents; see `family.Transforms`."""
        return self.transforms.analyse(images, quality)

    def choose(
        self,
        scaled: Tensor,
        quality: Qualities,
        effort: int = DEFAULT_EFFORT,
        tune: str = DEFAULT_TUNE,
        images: Tensor | None = None,
    ) -> Chosen:
        """Choose the symbols of a batch.

        Parameters
        ----------
        scaled : Tensor
            Latents in quantiser steps, float32 (N,h,w,C).
        quality : ndarray
            Quality of each image.
        effort : int
            0 takes the nearest symbols, 1 optimises rate and distortion, 2 and more refine (`refine.SCHEDULES`).
        tune : str
            Distortion that refinement lowers, as `distortion.py` names it.
        images : Tensor, optional
            The images (N,H,W,3) without padding; needed to refine.
        """
        scaled = scaled.clamp(-SYMBOL_MAX, SYMBOL_MAX).contiguous()
        whole = whole_quality(quality, 1, self.device)
        symbols, predictions = quantise(self.prior, self._rate_tables if effort else None, scaled, whole)
        if effort in SCHEDULES and self._rate_tables is not None and self.exact and images is not None:
            symbols, predictions = self._refined(images, symbols, quality, effort, tune), None
        return Chosen(symbols.to(torch.int16), predictions)

    def choose_paths(
        self, latents: NDArray[np.int32], quality: float, features: bool
    ) -> tuple[NDArray[np.int16], bytes | None]:
        """Choose the symbols int16 (S,h,w,C) of a chunk on a path through the trellis, on the host.

        Parameters
        ----------
        latents : ndarray
            int32 (S,h,w,C).
        quality : float
        features : bool
            Whether to encode them, too.
        """
        steps = cast(IntegerTransforms, self.transforms).steps(np.array([quality]), trellis=True)[0].cpu().numpy()
        whole = int(whole_qualities(np.array([quality]))[1][0])
        return self._paths().choose(latents, steps, whole, True, features, True)

    def refine_paths(
        self, images: Tensor, latents: NDArray[np.int32], quality: float, effort: int, tune: str
    ) -> NDArray[np.int16]:
        """Return refined symbols int16 (S,h,w,C) of a chunk, those of a path through the trellis.

        Parameters
        ----------
        images : Tensor
            (S,H,W,3) without padding.
        latents : ndarray
            int32 (S,h,w,C).
        """
        qualities = np.array([quality])
        half = cast(IntegerTransforms, self.transforms).steps(qualities, trellis=True)[0].cpu().numpy()
        paths = ChunkPaths(self._paths(), half, int(whole_qualities(qualities)[1][0]))
        size = max(1, REFINE_PIXELS // (images.shape[1] * images.shape[2]))
        refined = self.refiner().refine_path(grey_levels(images), latents, paths, PATH_SCHEDULES[effort], tune, size)
        return refined.cpu().numpy()

    def _paths(self) -> PathPrior:
        with self._on_first_use:
            if self._path_prior is None:
                arch, arrays = load_checked(self.info)
                prior, rdo, gains = (below(arrays, part) for part in (PRIOR, RDO, GAINS))
                self._path_prior = PathPrior(cast(Architecture, arch), prior, rdo, gains, self.coder_tables)
            return self._path_prior

    def _refined(self, images: Tensor, symbols: Tensor, quality: Qualities, effort: int, tune: str) -> Tensor:
        """Return refined symbols (N,h,w,C) of images (N,H,W,3), a few images at a time."""
        steps = cast(IntegerTransforms, self.transforms).steps(quality, False)
        whole = torch.from_numpy(whole_qualities(quality)[1])
        size = max(1, REFINE_PIXELS // (images.shape[1] * images.shape[2]))
        refiner, parts = self.refiner(), []
        for k in range(0, len(images), size):
            part = slice(k, k + size)
            pixels = grey_levels(images[part])
            parts.append(refiner.refine(pixels, symbols[part], steps[part], whole[part], SCHEDULES[effort], tune))
        return torch.cat(parts)

    def refiner(self) -> Refiner:
        """Return the decoder in differentiable form, made on first use."""
        with self._on_first_use:
            if self._refiner is None:
                _, arrays = load_checked(self.info)
                synthesis, prior = (tensors_below(arrays, part) for part in (SYNTHESIS, PRIOR))
                with torch.inference_mode(False):
                    bf16 = multiplies_bfloat16(self.device)
                    self._refiner = Refiner(cast(Architecture, self.arch), synthesis, prior, self.device, bf16)
            return self._refiner

    def synthesise(self, symbols: NDArray[np.int16] | Tensor, quality: Qualities, q6: bool, trellis: bool) -> Tensor:
        """Reconstruct pixels from symbols; see `family.Transforms`."""
        return self.transforms.synthesise(symbols, quality, q6, trellis)

    def score(self, latents: Tensor, quality: Qualities) -> Tensor:
        """Score the label cells of latents (N,h,w,C).

        Returns
        -------
        Tensor
            uint8 (N, rows, columns, outputs): see `family.Transforms.score`. Cells are 64 x 64 pixels, smaller at
            the lower and right border.
        """
        n = LABEL_CELL // LATENT_STRIDE
        images, h, w, c = latents.shape
        rows, columns = ceil_div(h, n), ceil_div(w, n)
        scores = torch.empty((images, rows, columns, self.arch.outputs), dtype=torch.uint8, device=self.device)
        for r0, r1 in _equal_cells(h, n):
            for c0, c1 in _equal_cells(w, n):
                part = latents[:, r0 * n : min(r1 * n, h), c0 * n : min(c1 * n, w)]
                cell_h, cell_w = min(n, part.shape[1]), min(n, part.shape[2])
                cells = part.reshape(images, r1 - r0, cell_h, c1 - c0, cell_w, c).permute(0, 1, 3, 2, 4, 5)
                count = (r1 - r0) * (c1 - c0)
                values = self.transforms.score(cells.reshape(-1, cell_h, cell_w, c), np.repeat(quality, count))
                scores[:, r0:r1, c0:c1] = values.reshape(images, r1 - r0, c1 - c0, -1)
        return scores

    def encode_symbols(
        self,
        chosen: Chosen,
        chunks: int,
        qualities: list[float],
        pool: ThreadPoolExecutor | None = None,
        device_coder: DeviceCoder | None = None,
        batch_total: int = 0,
    ) -> Pending[list[bytes]]:
        """Start to encode the symbols of N chunks, stacked, to feature sections; see `coding.start_encoding`."""
        if (known := chosen.features) is not None:
            return lambda: known
        with torch.inference_mode(), side_stream(self.device) if device_coder else nullcontext():
            return start_encoding(
                self.prior,
                self.coder_tables,
                chosen.symbols,
                chunks,
                qualities,
                pool,
                predictions=chosen.predictions,
                device_coder=device_coder,
                batch_total=batch_total,
                trellis=chosen.trellis,
            )

    def decode_symbols(
        self,
        features: list[bytes],
        shape: Shape,
        qualities: list[float],
        pool: ThreadPoolExecutor | None,
        trellis: bool,
    ) -> list[NDArray[np.int16]]:
        """Decode feature sections of chunks of equal shape to symbols; see `coding.decode_symbols`."""
        with torch.inference_mode(), high_priority_stream(self.device):
            return decode_symbols(
                self.prior, self.coder_tables, features, shape[0], grid_of(shape), qualities, pool, trellis
            )

    def decode_symbols_on_device(
        self,
        features: list[bytes],
        shape: Shape,
        qualities: list[float],
        device_coder: DeviceCoder,
        batch_total: int,
        trellis: bool,
    ) -> tuple[Tensor, Pending[None]]:
        """Start to decode feature sections on the device; see `coding.start_decoding`."""
        with torch.inference_mode(), side_stream(self.device, after=False) as hand_over:
            symbols, check = start_decoding(
                self.prior, features, shape[0], grid_of(shape), qualities, device_coder, batch_total, trellis
            )
        with torch.inference_mode():
            return hand_over(symbols), check

    def device_coder(self) -> DeviceCoder | None:
        """Return the device's own entropy coder, if it has one; compiled and checked on first use."""
        if self.device.type == "cpu":
            return None
        with self._on_first_use:
            if not self._device_coder_tried:
                self._device_coder_tried = True
                self._device_coder = device_coder_for(
                    self.coder_tables, self.arch.latents, self.prior.steps, self.device
                )
            return self._device_coder


def _equal_cells(size: int, n: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of cells of equal size along one axis: the whole cells, then a last smaller one."""
    whole = size // n
    if whole:
        yield 0, whole
    if size % n:
        yield whole, whole + 1
