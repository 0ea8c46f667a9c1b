"""From chunk arrays to payloads and back, for both Zarr formats.

A chunk is arranged as images (`codecs.images`), its values are scaled to what the networks take (`codecs.values`), and
the quality is found if a size or a PSNR was asked for (`codecs.rate`).
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec import config as settings
from deepsic_codec.codec.bands import chunk_of, from_images, grouping_of, samples_of, to_images
from deepsic_codec.codec.batching import Batcher
from deepsic_codec.codec.memory import in_halves
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.codec.rate_search import Search, Trial
from deepsic_codec.codec.scaled import (
    DTYPES,
    UINT8,
    Shown,
    bound,
    check_finite,
    check_values,
    decibels,
    extent,
    finest_step,
    refine,
    restore,
    show,
)
from deepsic_codec.errors import (
    ConfigurationError,
    CorruptPayload,
    DeepSICError,
    UnsupportedArray,
    UnsupportedPayload,
)
from deepsic_codec.payload import header as payload_header
from deepsic_codec.payload import labels as payload_labels
from deepsic_codec.payload import nodata as payload_nodata
from deepsic_codec.payload.constants import LABEL_CELL, LATENT_STRIDE
from deepsic_codec.payload.fields import MAX_BANDS, Header, image_count
from deepsic_codec.payload.residual import Residual
from deepsic_codec.payload.sections import FEATURES, LABELS, NODATA, RESIDUAL, VALUE_RANGE, Section
from deepsic_codec.payload.value_range import Ranges

if TYPE_CHECKING:
    from deepsic_codec.model.file import ModelInfo
    from deepsic_codec.model.scheduler import Encoded, Scheduler

MAX_SAMPLES = 1 << 31  # of a chunk, fixed by the payload header
MAX_BANDS = MAX_BANDS


def check_chunk(shape: Sequence[int], dtype: np.dtype, config: CodecParams) -> None:
    """Raise UnsupportedArray or ConfigurationError unless chunks of this shape and dtype can be coded."""
    axes = config.axes
    if len(shape) == 1 and np.dtype(dtype).newbyteorder("=") in DTYPES:
        raise UnsupportedArray(
            f"flat chunk of {shape[0]} samples where axes {axes!r} were expected: a filter before DeepSIC lost the "
            "shape; use DeepSIC without filters"
        )
    bands = shape[axes.index("c")] if "c" in axes and len(shape) == len(axes) else 1
    check_values(dtype, config, bands)
    check_axes(shape, axes)
    if bands > MAX_BANDS:
        raise UnsupportedArray(
            f"chunk {tuple(shape)} with axes {axes!r} has {bands} bands: at most {MAX_BANDS}; choose chunks so"
        )
    if not 0 < prod(shape) <= MAX_SAMPLES:
        raise UnsupportedArray(f"chunk {tuple(shape)}: expected 1 to {MAX_SAMPLES} samples; choose other chunks")


def check_size(images: int, height: int, width: int, error: type[DeepSICError]) -> None:
    """Raise an error unless the symbols of a chunk, which have a border, take no more memory than is allowed."""
    rows, columns = -(-height // LATENT_STRIDE) + 2, -(-width // LATENT_STRIDE) + 2
    most = settings.get().max_pixels
    if images * rows * columns * LATENT_STRIDE**2 > most:
        raise error(
            f"chunk of {images} images of {height} x {width} pixels: with their borders more than the {most} pixels "
            "that a chunk may have here; if it is meant to be so large, deepsic_codec.config.set(max_pixels=...)"
        )


def check_axes(shape: Sequence[int], axes: str) -> None:
    """Raise UnsupportedArray unless `axes` names every axis of this shape."""
    if len(shape) != len(axes):
        raise UnsupportedArray(
            f"shape {tuple(shape)} has {len(shape)} axes, but axes={axes!r} names {len(axes)}; pass DeepSIC(axes=...) "
            "with one letter for each axis of the array"
        )


def check_exact(config: CodecParams) -> None:
    """Raise ConfigurationError if a bound on the error is asked of a model that cannot keep it everywhere."""
    if config.max_error is None:
        return
    from deepsic_codec.model.families import family_of
    from deepsic_codec.model.zoo import find_model

    decoder, head = config.identity()
    info = find_model(decoder, head=head)
    if not family_of(info.architecture).exact:
        raise ConfigurationError(_inexact(info))


def _inexact(info: "ModelInfo") -> str:
    return (
        f"max_error: model {info.name!r} decodes in floating point, which differs between machines, so no bound can be "
        "kept; use a model with integer synthesis, or no max_error"
    )


@dataclass(frozen=True, eq=False)
class EncodeJob:
    """A chunk to encode, checked."""

    config: CodecParams
    array: np.ndarray
    order: str
    inside: tuple[int, ...] | None = None

    @property
    def key(self) -> tuple[str, str | None, str]:
        """Chunks for one model are encoded together, whatever their quality and semantics."""
        return *self.config.identity(), self.config.model

    @property
    def pixels(self) -> int:
        """Pixels of the images that the networks see."""
        return self.array.size // self.bands * self.images

    @property
    def bands(self) -> int:
        """Samples of a pixel."""
        axes = self.config.axes
        return self.array.shape[axes.index("c")] if "c" in axes else 1

    @property
    def grouping(self) -> int:
        """How bands are joined to images."""
        return grouping_of(self.bands, self.config.bands)

    @property
    def images(self) -> int:
        """Images of a slice."""
        return image_count(self.bands, self.grouping)


def encode_job(
    config: CodecParams, array: np.ndarray, order: str | None = None, inside: Sequence[int] | None = None
) -> EncodeJob:
    """Check a chunk that is to be encoded.

    Parameters
    ----------
    config : CodecParams
        How to encode it.
    array : ndarray
        The chunk; not copied before the job runs, never written to, and not kept after it.
    order : {"C", "F"}, optional
        Memory order in which decoding is to return the chunk; the array's own by default.
    inside : sequence of int, optional
        How many samples along each axis are data, from the first on; the rest is padding and gets no labels.
    """
    check_chunk(array.shape, array.dtype, config)
    check_finite(array, config)
    if order is None:  # either name fits an array that is contiguous in both orders
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    job = EncodeJob(config.resolved(), array, order, None if inside is None else tuple(inside))
    height, width = (array.shape[config.axes.index(axis)] for axis in "yx")
    check_size(job.pixels // (height * width), height, width, UnsupportedArray)
    return job


def run_encode(jobs: Sequence[EncodeJob]) -> list[bytes]:
    """Encode chunks of one key in one call on this thread, past the batcher: for callers that have whole batches."""
    info, runtime = _model(*jobs[0].key)
    if any(job.config.max_error is not None for job in jobs) and not runtime.model.exact:
        raise ConfigurationError(_inexact(info))
    shown = [show(samples_of(job.array, job.config.axes), job.config) for job in jobs]
    searches = [
        Search(job.config, job.array.size // job.bands, extent(one), finest_step(one) if runtime.model.exact else None)
        for job, one in zip(jobs, shown, strict=True)
    ]
    while todo := [number for number, search in enumerate(searches) if not search.done]:
        asked = [(searches[i].quality, searches[i].step) for i in todo]
        trials = _try([jobs[i] for i in todo], [shown[i] for i in todo], asked, info, runtime)
        for i, trial in zip(todo, trials, strict=True):
            searches[i].add(trial)
    return [search.best for search in searches]


def _try(
    jobs: Sequence[EncodeJob],
    shown: Sequence[Shown],
    asked: Sequence[tuple[float, float | None]],
    info: "ModelInfo",
    runtime: "Scheduler",
) -> list[Trial]:
    """Encode chunks at these qualities, with a residual of these steps if there is one."""
    qualities = [quality for quality, _ in asked]
    full = [i for i, one in enumerate(shown) if not one.empty]
    again = {i: None for i in full if jobs[i].config.max_error is not None or jobs[i].config.quality is None}
    features: dict[int, Encoded] = {}  # of those that are looked at again
    trials: dict[int, Trial] = {}

    def pack(i: int, coded: "Encoded | None", residual: Residual | None = None, found: float = float("inf")) -> None:
        payload = _pack(jobs[i], shown[i], coded, qualities[i], residual, info)
        trials[i] = Trial(payload, len(payload), found)

    def keep(i: int, coded: "Encoded") -> None:
        if i in again:
            features[i] = coded
        else:
            pack(i, coded)

    if full:
        runtime.encode(
            [to_images(shown[i].bands, jobs[i].grouping) for i in full],
            [qualities[i] for i in full],
            labels=any(jobs[i].config.semantics == "pre" for i in full),
            efforts=[jobs[i].config.effort for i in full],
            tunes=[jobs[i].config.tune for i in full],
            finish=[partial(keep, i) for i in full],
        )
    if again:
        images = runtime.decode(
            [features[i].features for i in again],
            [(len(shown[i].bands) * jobs[i].images, *shown[i].bands.shape[1:3]) for i in again],
            [qualities[i] for i in again],
            [shown[i].ranges is not None for i in again],
        )
        for i, some in zip(again, images, strict=True):
            decoded, most = from_images(some, jobs[i].bands, jobs[i].grouping), jobs[i].config.max_error
            if most is not None:
                pack(i, features[i], bound(shown[i], decoded, most))
            else:
                residual = None if (step := asked[i][1]) is None else refine(shown[i], decoded, step)
                pack(i, features[i], residual, decibels(shown[i], decoded, residual))
    for i, one in enumerate(shown):
        if one.empty:
            pack(i, None)
    return [trials[i] for i in range(len(jobs))]


def _pack(
    job: EncodeJob,
    shown: Shown,
    encoded: "Encoded | None",
    quality: float,
    residual: Residual | None,
    info: "ModelInfo",
) -> bytes:
    config = job.config
    slices, height, width, _ = shown.samples.shape
    sections: dict[Section[Any], Any] = {}
    if encoded is not None:
        sections[FEATURES] = encoded.features
    if shown.ranges is not None:
        sections[VALUE_RANGE] = shown.ranges
    if shown.nodata is not None:
        sections[NODATA] = shown.nodata
    if residual is not None:
        sections[RESIDUAL] = residual
    if config.semantics == "pre" and (encoded is None or encoded.cells is not None):
        tile = config.label_tile or payload_labels.default_tile(height, width)
        if encoded is None:
            cells = np.zeros((slices, -(-height // LABEL_CELL), -(-width // LABEL_CELL), 1), np.uint8)
        else:
            assert encoded.cells is not None
            cells = _votes(encoded.cells[:: job.images], shown.mask)
        if job.inside is not None:
            cells = _without_padding(cells, config.axes, job)
        scores = payload_labels.tile_scores(cells, tile)
        sections[LABELS] = payload_labels.best_labels(scores, tile)
    return payload_header.pack(
        dtype=job.array.dtype,
        shape=job.array.shape,
        order=job.order,
        axes=config.axes,
        decoder=bytes.fromhex(info.decoder)[:8],
        # Without semantics no head had a say: readers then look for no labels.
        head=bytes.fromhex(info.head)[:4] if info.head and config.semantics != "none" else bytes(4),
        quality=quality,
        grid=(-(-height // LATENT_STRIDE), -(-width // LATENT_STRIDE)) if encoded is None else encoded.grid,
        sections=sections,
        grouping=job.grouping,
    )


def _votes(cells: NDArray[np.uint8], mask: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """Return label cells (slices, rows, columns, classes) with no score where no pixel of a cell has any data."""
    if mask is None:
        return cells
    data = ~mask.all(axis=-1)
    for axis in (1, 2):
        data = np.logical_or.reduceat(data, np.arange(0, data.shape[axis], LABEL_CELL), axis=axis)
    return cells * np.broadcast_to(data, cells.shape[:3])[..., None]


def _without_padding(cells: np.ndarray, axes: str, job: EncodeJob) -> np.ndarray:
    """Return label cells (slices, rows, columns, classes) with no score for those that lie wholly in padding."""
    assert job.inside is not None
    inside = dict(zip(axes, job.inside, strict=True))
    sizes = dict(zip(axes, job.array.shape, strict=True))
    slices = [axis for axis in axes if axis not in "yxc"]
    shaped = cells.reshape(*(sizes[axis] for axis in slices), *cells.shape[1:])
    counts = [*(inside[axis] for axis in slices), *(-(-inside[axis] // LABEL_CELL) for axis in "yx")]
    kept = np.zeros_like(shaped)
    region = tuple(slice(count) for count in counts)
    kept[region] = shaped[region]
    return kept.reshape(cells.shape)


@dataclass(frozen=True, eq=False)
class DecodeJob:
    """A payload to decode, its header and checksums verified.

    Attributes
    ----------
    header : Header
        Its header.
    features : bytes or None
        None if there is no data in the chunk.
    ranges : ndarray or None
        The value range; None for uint8 as it is.
    nodata : bytes or None
        The coded section.
    residual : Residual or None
        Added to decoded samples.
    """

    header: Header
    features: bytes | None
    ranges: Ranges | None = None
    nodata: bytes | None = None
    residual: Residual | None = None

    @property
    def key(self) -> bytes:
        """Payloads of one decoder are decoded together."""
        return self.header.decoder

    @property
    def pixels(self) -> int:
        """Pixels of the images that the networks see."""
        return prod(self.images_shape)

    @property
    def images_shape(self) -> tuple[int, int, int]:
        """Images, height, width."""
        return self.header.images, self.header.height, self.header.width


def decode_job(payload: Any, shape: tuple[int, ...] | None = None) -> DecodeJob:
    """Verify a payload that is to be decoded.

    Parameters
    ----------
    payload : bytes-like
        A whole payload; not kept.
    shape : tuple of int, optional
        The chunk shape, where the caller knows it.

    Raises
    ------
    CorruptPayload
        If a checksum does not match, something is missing, or the payload is not that of a chunk of this shape.
    UnsupportedPayload
        If it is no payload of DeepSIC, or needs a newer version.
    """
    unpacked = payload_header.unpack(payload)
    header = unpacked.header
    if shape is not None and tuple(shape) != tuple(header.shape):
        raise CorruptPayload(f"header: payload of a chunk {tuple(header.shape)} where the array has {tuple(shape)}")
    grid = -(-header.height // LATENT_STRIDE), -(-header.width // LATENT_STRIDE)
    if tuple(header.grid) != grid:
        raise CorruptPayload(f"header: symbol grid {tuple(header.grid)} where images of this size have {grid}")
    check_size(header.images, header.height, header.width, UnsupportedPayload)
    features, nodata = unpacked.read(FEATURES), unpacked.sections.get(NODATA.kind)
    ranges, residual = unpacked.read(VALUE_RANGE), unpacked.read(RESIDUAL)
    if features is None and not payload_nodata.is_empty(nodata, header):
        raise CorruptPayload("section table: there is no feature section")
    if ranges is None and header.dtype != UINT8:
        raise CorruptPayload(f"section table: there is no value range section, and samples are {header.dtype}")
    if features is None and residual is not None:
        raise CorruptPayload("section table: a residual section without features")
    return DecodeJob(header, features, ranges, nodata, residual)


def run_decode(jobs: Sequence[DecodeJob]) -> list[np.ndarray]:
    """Decode payloads of one key in one call on this thread, past the batcher."""
    full = [job for job in jobs if job.features is not None]
    if not full:
        return [_restored(job, None) for job in jobs]
    _, runtime = _model(jobs[0].key.hex())
    fine = [job.ranges is not None for job in full]
    restored = iter(runtime.decode(*_streams(full), fine, finish=[partial(_restored, job) for job in full]))
    return [_restored(job, None) if job.features is None else next(restored) for job in jobs]


def _restored(job: DecodeJob, images: NDArray[Any] | None) -> NDArray[Any]:
    header = job.header
    nodata = None if job.nodata is None else payload_nodata.decode_nodata(job.nodata, header)
    if images is None:
        assert nodata is not None
        return np.full(header.shape, nodata.value, header.dtype, order="F" if header.order == "F" else "C")
    samples = restore(from_images(images, header.channels, header.grouping), job.ranges, job.residual, nodata)
    return chunk_of(samples, header.shape, header.axes, header.order, header.dtype)


def _streams(jobs: Sequence[DecodeJob]) -> tuple[list[bytes], list[tuple[int, int, int]], list[float]]:
    features = [job.features for job in jobs if job.features is not None]
    return features, [job.images_shape for job in jobs], [job.header.quality for job in jobs]


def decode_features(job: DecodeJob) -> np.ndarray:
    """Decode a payload to its symbols but not to pixels.

    Returns
    -------
    ndarray
        int16 (slices, latents, grid rows, grid columns), those of all images of a slice one after the other along the
        second axis. Zeros for a chunk without data.
    """
    header = job.header
    info, runtime = _model(job.key.hex())
    if job.features is None:
        latents = int(info.architecture["latents"])
        return np.zeros((header.slices, header.images // header.slices * latents, *header.grid), np.int16)
    symbols = runtime.decode_symbols(*_streams([job]))[0]
    return symbols.reshape(header.slices, -1, *symbols.shape[2:])


def label_cells(jobs: Sequence[DecodeJob], info: "ModelInfo", runtime: "Scheduler") -> list[NDArray[np.uint8]]:
    """Compute the scores of label cells from stored features.

    Parameters
    ----------
    jobs : sequence of DecodeJob
        Payloads of the decoder that the runtime has.
    info, runtime : ModelInfo, Scheduler
        The model with the head that is to judge.

    Returns
    -------
    list of ndarray
        For each job uint8 (slices, rows, columns, classes), 0 for cells without data.
    """
    full = [job for job in jobs if job.features is not None]
    found: Any = iter(())
    if full:
        features, shapes, qualities = _streams(full)
        symbols = runtime.decode_symbols(features, shapes, qualities)
        first = [some[:: job.header.images // job.header.slices] for job, some in zip(full, symbols, strict=True)]
        slices = [(job.header.slices, *shape[1:]) for job, shape in zip(full, shapes, strict=True)]
        found = iter(runtime.score(first, slices, qualities))
    cells = []
    for job in jobs:
        header = job.header
        if job.features is None:
            shape = header.slices, -(-header.height // LABEL_CELL), -(-header.width // LABEL_CELL)
            cells.append(np.zeros((*shape, len(info.vocabulary.classes) + 1), np.uint8))
        else:
            nodata = None if job.nodata is None else payload_nodata.decode_nodata(job.nodata, header)
            cells.append(_votes(next(found), None if nodata is None else nodata.mask))
    return cells


def compute_labels(job: DecodeJob, label_tile: tuple[int, int] | None = None) -> payload_labels.LabelBlock:
    """Compute labels from stored features, with the head that the header names, for tiles of this size in pixels."""
    (cells,) = label_cells([job], *_model(job.key.hex(), job.header.head.hex()))
    tile = label_tile or payload_labels.default_tile(job.header.height, job.header.width)
    return payload_labels.best_labels(payload_labels.tile_scores(cells, tile), tile)


def _model(decoder: str, head: str | None = None, name: str | None = None) -> "tuple[ModelInfo, Scheduler]":
    """Return the model; to encode, the one of this name if there are several with the decoder and head."""
    # Here and not above: only coding needs torch, and only it may take the seconds that importing torch takes.
    from deepsic_codec.model.scheduler import get_scheduler
    from deepsic_codec.model.zoo import find_model

    info = find_model(decoder, head=head, preferred=name)
    return info, get_scheduler(info)


def _limit() -> int:
    chosen = settings.get()
    torch = sys.modules.get("torch")  # not imported for this: with the first batch it will be there
    threads = chosen.threads
    if threads is None:
        threads = os.cpu_count() or 1 if torch is None else torch.get_num_threads()
    return chosen.pixels_per_batch(settings.device_in_use().split(":")[0], threads)


ENCODER = Batcher(in_halves(run_encode), _limit)
DECODER = Batcher(in_halves(run_decode), _limit)


def results(outcomes: list[Any]) -> list[Any]:
    """Return what a batcher gave, or raise the first exception in it."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes
