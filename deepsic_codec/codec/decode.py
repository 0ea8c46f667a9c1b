"""Decode payloads to chunks, to symbols, or to labels."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from deepsic_codec import config
from deepsic_codec.axes import ceil_div
from deepsic_codec.codec.bands import from_images, to_images
from deepsic_codec.codec.batching import Batcher, batch_limit, in_halves
from deepsic_codec.codec.chunk import check_size, load_model
from deepsic_codec.codec.labels import Scores, cells_with_data, no_scores, tile_labels
from deepsic_codec.codec.scaled import UINT8, scale, unscale
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.header import unpack
from deepsic_codec.payload.labels import LabelBlock
from deepsic_codec.payload.nodata import NoData, decode_nodata, is_empty
from deepsic_codec.payload.residual import Residual
from deepsic_codec.payload.sections import FEATURES, NODATA, RESIDUAL, VALUE_RANGE
from deepsic_codec.payload.value_range import Ranges

if TYPE_CHECKING:
    from deepsic_codec.model.file import ModelInfo
    from deepsic_codec.model.scheduler import Scheduler

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PayloadToDecode:
    """A payload with verified header and checksums."""

    header: Header
    features: bytes | None  # None for a chunk without data, and for most chunks with a residual
    ranges: Ranges | None = None  # None for uint8 that is not scaled
    nodata_section: bytes | None = None  # still coded
    residual: Residual | None = None

    @property
    def key(self) -> bytes:
        """Payloads of one decoder are decoded together."""
        return self.header.decoder

    @property
    def pixels(self) -> int:
        """Pixels of all images that the networks see."""
        return prod(self.image_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Number, height and width of the images that the networks see."""
        return self.header.images, self.header.height, self.header.width

    @property
    def empty(self) -> bool:
        """Whether no sample is data."""
        return self.features is None and self.residual is None

    def nodata(self) -> NoData | None:
        """Decode the nodata section."""
        return None if self.nodata_section is None else decode_nodata(self.nodata_section, self.header)


def parse_payload(payload: Any, shape: tuple[int, ...] | None = None) -> PayloadToDecode:
    """Verify a payload that is to be decoded.

    Parameters
    ----------
    payload : bytes-like
        A whole payload; not kept.
    shape : tuple of int, optional
        The chunk shape, if the caller knows it.

    Raises
    ------
    CorruptPayload
        If a checksum does not match, a section is missing, or the payload is not that of a chunk of this shape.
    UnsupportedPayload
        If it is no payload of DeepSIC, is larger than the limit `max_pixels`, or needs a newer version.
    """
    unpacked = unpack(payload)
    header = unpacked.header
    if shape is not None and tuple(shape) != tuple(header.shape):
        raise CorruptPayload(f"header: chunk shape {tuple(header.shape)}, expected {tuple(shape)}")
    grid = ceil_div(header.height, LATENT_STRIDE), ceil_div(header.width, LATENT_STRIDE)
    if tuple(header.grid) != grid:
        raise CorruptPayload(f"header: symbol grid {tuple(header.grid)}, expected {grid} for images of this size")
    check_size(header.images, header.height, header.width, UnsupportedPayload)
    features, nodata_section = unpacked.read(FEATURES), unpacked.sections.get(NODATA.kind)
    ranges, residual = unpacked.read(VALUE_RANGE), unpacked.read(RESIDUAL)
    empty = is_empty(nodata_section, header)
    if features is None and residual is None and not empty:
        raise CorruptPayload("section table: the features section is missing")
    if ranges is None and header.dtype != UINT8:
        raise CorruptPayload(f"section table: the value range section is missing, which samples of {header.dtype} need")
    if empty and residual is not None:
        raise CorruptPayload("section table: a residual section of a chunk without data")
    return PayloadToDecode(header, features, ranges, nodata_section, residual)


def decode_payloads(payloads: Sequence[PayloadToDecode]) -> list[NDArray[Any]]:
    """Decode payloads of one key to chunks, in one call on this thread.

    For callers that have whole batches; `DECODER` joins the payloads of several callers.

    Raises
    ------
    CorruptPayload
        If a section is damaged.
    """
    lossy = [payload for payload in payloads if not payload.empty and payload.residual is None]
    bounded = [payload for payload in payloads if payload.residual is not None]
    chunks: Iterator[NDArray[Any]] = iter(())
    if lossy:
        _, scheduler = load_model(payloads[0].key.hex())
        q6 = [payload.ranges is not None for payload in lossy]
        finish = [partial(_restore_chunk, payload) for payload in lossy]
        chunks = iter(scheduler.decode(*_columns(lossy), q6, finish))
    exact = iter(_on_threads(_bounded_chunk, bounded))
    results = []
    for payload in payloads:
        if payload.residual is not None:
            results.append(next(exact))
        else:
            results.append(_empty_chunk(payload) if payload.empty else next(chunks))
    return results


def _on_threads(function: Callable[[PayloadToDecode], T], payloads: Sequence[PayloadToDecode]) -> list[T]:
    """Apply a function to payloads, on several threads; without a model, there is no scheduler that has some."""
    threads = min(len(payloads), config.get().threads or os.cpu_count() or 1)
    if threads < 2:
        return [function(payload) for payload in payloads]
    with ThreadPoolExecutor(threads, "deepsic-decode") as pool:
        return list(pool.map(function, payloads))


def _empty_chunk(payload: PayloadToDecode) -> NDArray[Any]:
    header, nodata = payload.header, payload.nodata()
    assert nodata is not None  # `parse_payload` saw to it
    return np.full(header.shape, nodata.value, header.dtype, order="F" if header.order == "F" else "C")


def _restore_chunk(payload: PayloadToDecode, images: NDArray[Any]) -> NDArray[Any]:
    """Turn decoded images into a contiguous chunk."""
    header, nodata = payload.header, payload.nodata()
    bands = from_images(images, header.channels, header.grouping)
    samples = unscale(bands, payload.ranges)
    if nodata is not None:
        samples = samples if samples.flags.writeable and samples is not bands else samples.copy()
        nodata.apply(samples)
    return _arranged(samples, header)


def _bounded_chunk(payload: PayloadToDecode) -> NDArray[Any]:
    """Decode a chunk that has a residual."""
    return _arranged(_bounded_samples(payload, payload.nodata()), payload.header)


def _bounded_samples(payload: PayloadToDecode, nodata: NoData | None) -> NDArray[Any]:
    assert payload.residual is not None
    samples = payload.residual.decode(payload.header, nodata)
    if nodata is not None:
        nodata.apply(samples)
    return samples


def _arranged(samples: NDArray[Any], header: Header) -> NDArray[Any]:
    """Return samples (slices, height, width, bands) as a contiguous chunk."""
    chunk = header.axes.from_samples(samples, header.shape)
    return np.array(chunk, header.dtype, order="F" if header.order == "F" else "C")


def _columns(payloads: Sequence[PayloadToDecode]) -> tuple[list[bytes], list[tuple[int, int, int]], list[float]]:
    """Return features, shapes and qualities of payloads with data."""
    features = [payload.features or b"" for payload in payloads]
    return features, [payload.image_shape for payload in payloads], [payload.header.quality for payload in payloads]


def decode_symbols(payload: PayloadToDecode) -> NDArray[np.int16]:
    """Decode a payload to its symbols, int16 (slices, latents, grid rows, grid columns).

    The latents of all images of a slice follow one another. A chunk without data has zeros. A chunk without features
    has the symbols that encoding its samples gives.
    """
    header = payload.header
    info, scheduler = load_model(payload.key.hex())
    if payload.empty:
        from deepsic_codec.model.families import architecture_from  # late: it imports torch

        latents = architecture_from(info.architecture).latents
        return np.zeros((header.slices, header.images // header.slices * latents, *header.grid), np.int16)
    if payload.features is None:
        symbols = _symbols_again(payload, scheduler)
    else:
        symbols = scheduler.decode_symbols(*_columns([payload]))[0]
    return symbols.reshape(header.slices, -1, *symbols.shape[2:])


def decode_latents(payload: PayloadToDecode) -> NDArray[np.float32]:
    """Decode a payload to its latents, float32 with the axes of `decode_symbols`: symbols times quantiser steps."""
    symbols = decode_symbols(payload)
    _, scheduler = load_model(payload.key.hex())
    slices, _, rows, columns = symbols.shape
    images = payload.header.images
    by_image = symbols.reshape(images, -1, rows, columns).transpose(0, 2, 3, 1)
    quality = np.full(images, payload.header.quality)
    latents = scheduler.model.latents_of(np.ascontiguousarray(by_image), quality).float().cpu().numpy()
    return latents.transpose(0, 3, 1, 2).reshape(slices, -1, rows, columns)


def compute_cells(payloads: Sequence[PayloadToDecode], info: "ModelInfo", scheduler: "Scheduler") -> list[Scores]:
    """Compute the scores of label cells, 0 in cells without data, from stored features.

    All payloads are of the model's decoder. `info` and `scheduler` are those of the model whose head scores. Chunks
    without features are encoded again.
    """
    without = [payload for payload in payloads if payload.features is None and not payload.empty]
    again = iter(_cells_again(without, scheduler))
    with_data = [payload for payload in payloads if payload.features is not None]
    scores: Iterator[Scores] = iter(())
    if with_data:
        features, shapes, qualities = _columns(with_data)
        symbols = scheduler.decode_symbols(features, shapes, qualities)
        # The head sees the first image of each slice.
        first = [one[:: len(one) // payload.header.slices] for payload, one in zip(with_data, symbols, strict=True)]
        slices = [(payload.header.slices, *payload.image_shape[1:]) for payload in with_data]
        scores = iter(scheduler.score(first, slices, qualities))
    cells = []
    for payload in payloads:
        header = payload.header
        if payload.empty:
            classes = len(info.vocabulary.classes) + 1
            cells.append(no_scores(header.slices, header.height, header.width, classes))
        else:
            nodata = payload.nodata()
            score = next(scores) if payload.features is not None else next(again)
            cells.append(cells_with_data(score, None if nodata is None else nodata.mask))
    return cells


def _cells_again(payloads: Sequence[PayloadToDecode], scheduler: "Scheduler") -> list[Scores]:
    """Compute the scores of label cells of chunks without features, by encoding their samples."""
    if not payloads:
        return []
    images, qualities = _on_threads(_images, payloads), [payload.header.quality for payload in payloads]
    scores = []
    for payload, encoded in zip(payloads, scheduler.encode(images, qualities, features=False), strict=True):
        scores.append(encoded.cells[:: payload.header.images // payload.header.slices])
    return scores


def _symbols_again(payload: PayloadToDecode, scheduler: "Scheduler") -> NDArray[np.int16]:
    """Compute the symbols of a chunk without features, by encoding its samples."""
    quality = [payload.header.quality]
    encoded = scheduler.encode([_images(payload)], quality, features=False, labels=False, symbols=True)[0]
    return np.moveaxis(encoded.symbols, -1, 1)


def _images(payload: PayloadToDecode) -> NDArray[Any]:
    """Decode a chunk that has a residual to what the networks see."""
    nodata = payload.nodata()
    mask = None if nodata is None else nodata.mask
    bands = scale(_bounded_samples(payload, nodata), payload.ranges, mask)
    return to_images(bands, payload.header.grouping)


def compute_labels(payload: PayloadToDecode, label_tile: tuple[int, int] | None = None) -> LabelBlock:
    """Compute labels from stored features, with the head that the header names, for tiles of this size in pixels."""
    (cells,) = compute_cells([payload], *load_model(payload.key.hex(), payload.header.head.hex()))
    return tile_labels(cells, payload.header.height, payload.header.width, label_tile)


DECODER = Batcher(in_halves(decode_payloads), batch_limit)
