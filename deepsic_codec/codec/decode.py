"""Decode payloads to chunks, to symbols, or to labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.codec.bands import from_images, label_images
from deepsic_codec.codec.batching import Batcher, batch_limit, in_halves
from deepsic_codec.codec.chunk import load_model
from deepsic_codec.codec.labels import Cells, cells_with_data, no_cells, tile_labels
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.codec.scaled import UINT8, unscale
from deepsic_codec.codec.structure import join_grids
from deepsic_codec.codec.wavelet import decode_wavelet
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.model.threads import parallel_map
from deepsic_codec.payload.cast import Cast
from deepsic_codec.payload.constants import LATENT_STRIDE, MAX_QUALITY
from deepsic_codec.payload.fields import COLOURS, Header, Quantiser
from deepsic_codec.payload.header import Payload, unpack
from deepsic_codec.payload.labels import MAX_POOLING, LabelBlock
from deepsic_codec.payload.limits import (
    COLUMN_BYTES,
    FEATURES_BYTES,
    ROW_BYTES,
    SAMPLES_BYTES,
    check_memory,
    check_size,
)
from deepsic_codec.payload.nodata import NoData, decode_nodata, decode_value, is_empty
from deepsic_codec.payload.quality_map import QualityMap
from deepsic_codec.payload.residual import Residual
from deepsic_codec.payload.sections import (
    CAST,
    FEATURES,
    NODATA,
    QUALITY_MAP,
    RESIDUAL,
    SPECTRAL,
    STRUCTURE,
    VALUE_RANGE,
    WAVELET,
)
from deepsic_codec.payload.spectral import Matrix
from deepsic_codec.payload.structure import GRIDS, Grid, Structure, header_of, nodata_on_grid
from deepsic_codec.payload.value_range import Ranges
from deepsic_codec.payload.wavelet import Wavelet

if TYPE_CHECKING:
    from deepsic_codec.model.batch import Scheduler
    from deepsic_codec.model.file import ModelInfo


@dataclass(frozen=True, eq=False)
class PayloadToDecode:
    """A payload with verified header and checksums."""

    header: Header
    decoder: str  # SHA-256 of decoder and head, whole if the metadata has them, otherwise the first digits
    head: str
    features: bytes | None = None  # one of features, wavelet and residual; none for a chunk without data
    wavelet: Wavelet | None = None
    residual: Residual | None = None
    quality_map: QualityMap | None = None  # of the wavelet
    matrix: Matrix | None = None  # of the wavelet's components; None if they are the bands
    structure: Structure | None = None  # None if samples are all that their dtype can hold
    ranges: Ranges | None = None  # None for uint8 that is not scaled
    nodata_section: bytes | None = None  # still coded
    parts: tuple["PayloadToDecode", ...] = ()  # of the grids of `structure`; the samples of the chunk
    label_bands: tuple[int, ...] | None = None  # those of the metadata
    cast: Cast | None = None  # None for samples of the dtype of the header

    @property
    def empty(self) -> bool:
        """Whether the chunk has no data."""
        return self.features is None and self.wavelet is None and self.residual is None and not self.parts

    @property
    def key(self) -> str:
        """Payloads of one decoder are decoded together."""
        return self.decoder

    @property
    def pixels(self) -> int:
        """Pixels of all images that the networks see."""
        return prod(self.image_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Number, height and width of the images that the networks see, or of what takes as much memory."""
        header = self.header
        images = header.images if self.features is not None else header.slices * ceil_div(header.channels, 3)
        return images, header.height, header.width

    @property
    def nbytes(self) -> int:
        """Memory that decoding takes at most, estimated from its pixels; at least that of the samples."""
        header = self.header
        samples = prod(header.shape) * (self.cast or header).dtype.itemsize
        if self.empty:
            return samples
        if self.features is not None:
            cost = FEATURES_BYTES * self.pixels
        else:
            edges = ROW_BYTES * header.height + COLUMN_BYTES * header.width
            cost = SAMPLES_BYTES[header.dtype.itemsize] * self.pixels + edges
        return max(samples, cost + (0 if self.cast is None else 2 * samples))

    def nodata(self) -> NoData | None:
        """Decode the nodata section."""
        return None if self.nodata_section is None else decode_nodata(self.nodata_section, self.header)

    def restore(self, coded: NDArray[Any]) -> NDArray[Any]:
        """Return decoded samples, of any shape, in the dtype of the chunk."""
        if self.cast is None:
            return coded
        section = self.nodata_section
        return self.cast.restore(coded, None if section is None else decode_value(section, self.header))


def parse_payload(
    payload: Any,
    shape: tuple[int, ...] | None = None,
    dtype: np.dtype[Any] | None = None,
    params: CodecParams | None = None,
) -> PayloadToDecode:
    """Verify a payload that is to be decoded.

    Parameters
    ----------
    payload : bytes-like
        A whole payload; not kept.
    shape : tuple of int, optional
        The chunk shape, if the caller knows it.
    dtype : dtype, optional
        The dtype of the samples, in any byte order, if the caller knows it.
    params : CodecParams, optional
        Parameters in the metadata of the array, which name the model by its whole hashes.

    Raises
    ------
    CorruptPayload
        If a checksum does not match, a section is missing, or the payload is not that of a chunk of this shape and
        dtype.
    UnsupportedPayload
        If it is no payload of DeepSIC, is larger than the limits `max_pixels` or `max_memory`, or needs a newer
        version.
    """
    return parse_unpacked(unpack(payload), shape, dtype, params)


def parse_unpacked(
    unpacked: Payload, shape: tuple[int, ...] | None, dtype: np.dtype[Any] | None, params: CodecParams | None
) -> PayloadToDecode:
    """Verify a payload whose checksums are verified; as `parse_payload`."""
    header = unpacked.header
    if shape is not None and tuple(shape) != tuple(header.shape):
        raise CorruptPayload(f"header: chunk shape {tuple(header.shape)}, expected {tuple(shape)}")
    cast = unpacked.read(CAST)
    of_chunk = header.dtype if cast is None else cast.dtype
    if dtype is not None and of_chunk.newbyteorder("=") != np.dtype(dtype).newbyteorder("="):
        raise CorruptPayload(f"header: samples of {of_chunk}, expected {dtype}")
    grid = ceil_div(header.height, LATENT_STRIDE), ceil_div(header.width, LATENT_STRIDE)
    if tuple(header.grid) != grid:
        raise CorruptPayload(f"header: symbol grid {tuple(header.grid)}, expected {grid} for images of this size")
    nodata_section, ranges = unpacked.sections.get(NODATA.kind), unpacked.read(VALUE_RANGE)
    if ranges is None and header.dtype != UINT8:
        raise CorruptPayload(f"section table: the value range section is missing, which samples of {header.dtype} need")
    identity = (header.decoder.hex(), header.head.hex()) if params is None else params.identity_of(header)
    if cast is not None and cast.nodata is not None and nodata_section is None:
        raise CorruptPayload("section table: a cast section with a NoData value, without a nodata section")
    parsed = replace(_parse_sections(unpacked, identity, ranges, nodata_section), cast=cast)
    label_numbers = None if params is None else params.label_numbers
    if label_numbers is not None and max(label_numbers) < header.channels:
        parsed = replace(parsed, label_bands=label_numbers)
    check_size(*parsed.image_shape, UnsupportedPayload)
    check_memory(parsed.nbytes, f"decoding a chunk of shape {header.shape}", UnsupportedPayload)
    return parsed


def _parse_sections(
    unpacked: Payload, identity: tuple[str, str], ranges: Ranges | None, nodata_section: bytes | None
) -> PayloadToDecode:
    """Decode the sections with samples, of a chunk or of a grid."""
    header = unpacked.header
    coded = [section for section in (FEATURES, WAVELET, RESIDUAL) if section in unpacked]
    structure, matrix = unpacked.read(STRUCTURE), unpacked.read(SPECTRAL)
    grids = () if structure is None else structure.grids
    if not coded and not grids and not is_empty(nodata_section, header):
        raise CorruptPayload("section table: the features section is missing, and any other with samples")
    if len(coded) > 1:
        raise CorruptPayload(f"section table: both a {coded[0].name} section and a {coded[1].name} section")
    if coded and grids:
        raise CorruptPayload(f"section table: a {coded[0].name} section and a structure section with grids")
    if FEATURES in coded and header.grouping == COLOURS and header.channels not in (1, 3):
        raise CorruptPayload(f"header: one image of {header.channels} bands")
    if matrix is not None and WAVELET not in coded:
        raise CorruptPayload("section table: a spectral transform section without a wavelet section")
    if QUALITY_MAP in unpacked and WAVELET not in coded:
        raise CorruptPayload("section table: a quality map section without a wavelet section")
    if structure is not None and not grids and WAVELET not in coded and RESIDUAL not in coded:
        raise CorruptPayload("section table: a structure section without a wavelet section or a residual section")
    if structure is not None and structure.padding and nodata_section is not None:
        raise CorruptPayload("section table: a nodata section and a structure section with padding")
    features, wavelet, residual = unpacked.read(FEATURES), unpacked.read(WAVELET), unpacked.read(RESIDUAL)
    parts = tuple(_parse_grid(header, identity, grid, ranges, nodata_section) for grid in grids)
    return PayloadToDecode(
        header,
        *identity,
        features,
        wavelet,
        residual,
        unpacked.read(QUALITY_MAP),
        matrix,
        structure,
        ranges,
        nodata_section,
        parts,
    )


def _parse_grid(
    header: Header, identity: tuple[str, str], grid: Grid, ranges: Ranges | None, nodata_section: bytes | None
) -> PayloadToDecode:
    kinds = {section.kind for section in (SPECTRAL, QUALITY_MAP, RESIDUAL, WAVELET, STRUCTURE)}
    if not grid.sections.keys() <= kinds:
        raise CorruptPayload(f"structure section: a grid with sections of kinds {sorted(grid.sections)}")
    if grid.sections.get(STRUCTURE.kind, b"")[:1] == bytes((GRIDS,)):
        raise CorruptPayload("structure section: a grid with grids")
    of_bands = None if ranges is None else ranges[list(grid.bands)]
    parsed = _parse_sections(Payload(header_of(header, grid), grid.sections), identity, of_bands, nodata_section)
    if parsed.empty:
        raise CorruptPayload("structure section: a grid without samples")
    return parsed


def decode_payloads(payloads: Sequence[PayloadToDecode]) -> list[NDArray[Any]]:
    """Decode payloads of one key to chunks, in one call on this thread.

    For callers that have whole batches; `DECODER` joins the payloads of several callers.

    Raises
    ------
    CorruptPayload
        If a section is damaged.
    """
    return [payload.restore(chunk) for payload, chunk in zip(payloads, decode_coded(payloads), strict=True)]


def decode_coded(payloads: Sequence[PayloadToDecode]) -> list[NDArray[Any]]:
    """Decode payloads to chunks as `decode_payloads` does, but in the dtype of their headers."""
    chunks = {payload: _empty_chunk(payload) for payload in payloads if payload.empty}
    with_features = [payload for payload in payloads if payload.features is not None]
    if with_features:
        _, scheduler = load_model(payloads[0].decoder)
        q6 = [payload.ranges is not None for payload in with_features]
        finish = [partial(_restore_chunk, payload) for payload in with_features]
        decoded = scheduler.decode(*_columns(with_features), q6, finish)
        chunks |= zip(with_features, decoded, strict=True)
    others = [payload for payload in payloads if payload not in chunks]
    chunks |= zip(others, parallel_map(_decode_other, others), strict=True)
    return [chunks[payload] for payload in payloads]


def _empty_chunk(payload: PayloadToDecode) -> NDArray[Any]:
    header, nodata = payload.header, payload.nodata()
    assert nodata is not None  # `parse_payload` saw to it
    return np.full(header.shape, nodata.value, header.dtype, order="F" if header.order == "F" else "C")


def _restore_chunk(payload: PayloadToDecode, images: NDArray[Any]) -> NDArray[Any]:
    """Turn decoded images into a contiguous chunk."""
    bands = from_images(images, payload.header.channels, payload.header.grouping)
    samples, nodata = unscale(bands, payload.ranges), payload.nodata()
    if nodata is not None and (samples is bands or not samples.flags.writeable):
        samples = samples.copy()
    return _arranged(payload, samples, nodata).copy("K")  # not a part of the images of a batch


def _decode_other(payload: PayloadToDecode) -> NDArray[Any]:
    """Decode a chunk that has no features."""
    nodata = payload.nodata()
    return _arranged(payload, decode_samples(payload, nodata), nodata)


def decode_samples(payload: PayloadToDecode, nodata: NoData | None) -> NDArray[Any]:
    """Decode samples (slices, height, width, bands) of a chunk or grid without features; those without data are any."""
    header, structure = payload.header, payload.structure
    if structure is not None and structure.grids:
        shape = (header.slices, header.height, header.width, header.channels)
        of_grids = [None if nodata is None else nodata_on_grid(nodata, grid) for grid in structure.grids]
        parts = [decode_samples(part, one) for part, one in zip(payload.parts, of_grids, strict=True)]
        return join_grids(structure.grids, parts, shape)
    padding = decode_nodata(structure.padding, header) if structure is not None and structure.padding else None
    if payload.residual is not None:
        samples = payload.residual.decode(header, padding or nodata, structure)
    else:
        assert payload.wavelet is not None
        shape = (header.slices, header.height, header.width, header.channels)
        ranges, quality_map = payload.ranges, payload.quality_map
        samples, _ = decode_wavelet(payload.wavelet, payload.matrix, shape, header.dtype, ranges, quality_map)
        samples = samples if structure is None else structure.nearest(samples)
    if padding is not None:
        padding.apply(samples)
    return samples


def _arranged(payload: PayloadToDecode, samples: NDArray[Any], nodata: NoData | None) -> NDArray[Any]:
    """Return samples, to which NoData is applied in place, as a contiguous chunk, which may share their memory."""
    if nodata is not None:
        nodata.apply(samples)
    chunk = payload.header.axes.from_samples(samples, payload.header.shape)
    return np.asarray(chunk, payload.header.dtype, order="F" if payload.header.order == "F" else "C")


def _columns(payloads: Sequence[PayloadToDecode]) -> tuple[list[bytes], list[tuple[int, int, int]], list[Quantiser]]:
    """Return features, shapes and quantisers of payloads with data."""
    features = [payload.features or b"" for payload in payloads]
    return features, [payload.image_shape for payload in payloads], [payload.header.quantiser for payload in payloads]


def decode_symbols(payload: PayloadToDecode) -> NDArray[np.int16]:
    """Decode a payload to its symbols, int16 (slices, latents, grid rows, grid columns).

    The latents of all images of a slice follow one another. With a trellis, symbols are in halves of a step. A chunk
    without data has zeros.

    Raises
    ------
    UnsupportedPayload
        If the chunk has samples but no features.
    """
    if payload.features is None and not payload.empty:
        raise UnsupportedPayload("the chunk has no features; encode it with transform='features' and without max_error")
    header = payload.header
    info, scheduler = load_model(payload.decoder)
    if payload.features is None:
        from deepsic_codec.model.families import architecture_from  # late, as all of models

        latents = architecture_from(info.architecture).latents
        return np.zeros((header.slices, header.images // header.slices * latents, *header.grid), np.int16)
    symbols = scheduler.decode_symbols(*_columns([payload]))[0]
    return symbols.reshape(header.slices, -1, *symbols.shape[2:])


def decode_latents(payload: PayloadToDecode) -> NDArray[np.float32]:
    """Decode a payload to its latents, float32 with the axes of `decode_symbols`: symbols times quantiser steps."""
    symbols = decode_symbols(payload)
    _, scheduler = load_model(payload.decoder)
    slices, _, rows, columns = symbols.shape
    images = payload.header.images
    by_image = symbols.reshape(images, -1, rows, columns).transpose(0, 2, 3, 1)
    latents = scheduler.dequantise(np.ascontiguousarray(by_image), payload.header.quantiser)
    return latents.transpose(0, 3, 1, 2).reshape(slices, -1, rows, columns)


def compute_cells(payloads: Sequence[PayloadToDecode], info: "ModelInfo", scheduler: "Scheduler") -> list[Cells]:
    """Compute label cells, 0 in those without data, from stored features.

    Features are of the decoder of the model; pixels of chunks without features are analysed. `info` and `scheduler` are
    those of the model whose head scores.
    """
    with_features = [payload for payload in payloads if payload.features is not None]
    scores: dict[PayloadToDecode, Cells] = {}
    if with_features:
        features, shapes, quantisers = _columns(with_features)
        symbols = scheduler.decode_symbols(features, shapes, quantisers)
        # The head sees the first image of each slice.
        first = [one[:: len(one) // payload.header.slices] for payload, one in zip(with_features, symbols, strict=True)]
        slices = [(payload.header.slices, *payload.image_shape[1:]) for payload in with_features]
        scores |= zip(with_features, scheduler.score(first, slices, quantisers), strict=True)
    others = [payload for payload in payloads if payload.features is None and not payload.empty]
    if others:
        images = parallel_map(_decoded_label_images, others)
        qualities = [min(MAX_QUALITY, payload.header.quality) for payload in others]
        encoded = scheduler.encode(images, qualities, [0] * len(images), features=False, labels=True)
        scores |= zip(others, (one.cells for one in encoded), strict=True)
    cells = []
    for payload in payloads:
        header = payload.header
        if payload.empty:
            cells.append(no_cells(header.slices, header.height, header.width, info.outputs))
        else:
            nodata = payload.nodata()
            cells.append(cells_with_data(scores[payload], None if nodata is None else nodata.mask))
    return cells


def _decoded_label_images(payload: PayloadToDecode) -> NDArray[Any]:
    nodata = payload.nodata()
    mask = None if nodata is None else nodata.mask
    return label_images(decode_samples(payload, nodata), payload.ranges, mask, payload.label_bands)


def compute_labels(
    payload: PayloadToDecode, label_tile: tuple[int, int] | None = None, pooling: str = MAX_POOLING
) -> LabelBlock:
    """Compute labels from stored features, with the head that the header names, for tiles of this size in pixels."""
    info, scheduler = load_model(payload.decoder, payload.head)
    (cells,) = compute_cells([payload], info, scheduler)
    return tile_labels(cells, info.vocabulary, payload.header.height, payload.header.width, label_tile, pooling)


DECODER = Batcher(in_halves(decode_payloads), batch_limit)
