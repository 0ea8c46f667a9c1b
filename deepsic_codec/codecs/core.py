"""From chunk arrays to payloads and back, for both Zarr formats.

Between the two stands one layout of images, uint8 (slices, height, width, 3): every axis but y, x and c counts slices,
and grey is three equal channels, of which decoding takes the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from deepsic_codec import config as settings
from deepsic_codec.codecs.batching import Batcher
from deepsic_codec.codecs.config import CodecConfig
from deepsic_codec.codecs.memory import in_halves
from deepsic_codec.errors import CorruptPayload, UnsupportedArray, UnsupportedPayload
from deepsic_codec.payload import header as payload_header
from deepsic_codec.payload import labels as payload_labels

if TYPE_CHECKING:
    from deepsic_codec.model.file import ModelInfo
    from deepsic_codec.model.runtime import Encoded, Runtime

CHANNELS = (1, 3)
MAX_SAMPLES = 1 << 31  # of a chunk, fixed by the payload header
UINT8 = np.dtype("u1")
LATENT_STRIDE = 16  # pixels per symbol along y and x, in every architecture so far


def check_chunk(shape: Sequence[int], dtype: np.dtype, axes: str) -> None:
    """Raise UnsupportedArray unless chunks of this shape and dtype can be coded under `axes`."""
    if np.dtype(dtype) != UINT8:
        raise UnsupportedArray(
            f"dtype {dtype}: DeepSIC codes uint8 only in this version; convert the values to 0..255 and uint8 first"
        )
    if len(shape) == 1:
        raise UnsupportedArray(
            f"flat chunk of {shape[0]} samples where axes {axes!r} were expected: a filter before DeepSIC lost the "
            "shape; use DeepSIC without filters"
        )
    check_axes(shape, axes)
    if "c" in axes and shape[axes.index("c")] not in CHANNELS:
        raise UnsupportedArray(
            f"chunk {tuple(shape)} with axes {axes!r} has {shape[axes.index('c')]} channels: a chunk has to hold all 3 "
            "channels of a colour image, or 1; choose chunks so"
        )
    if not 0 < prod(shape) <= MAX_SAMPLES:
        raise UnsupportedArray(f"chunk {tuple(shape)}: expected 1 to {MAX_SAMPLES} samples; choose other chunks")


def check_axes(shape: Sequence[int], axes: str) -> None:
    """Raise UnsupportedArray unless `axes` names every axis of this shape."""
    if len(shape) != len(axes):
        raise UnsupportedArray(
            f"shape {tuple(shape)} has {len(shape)} axes, but axes={axes!r} names {len(axes)}; pass DeepSIC(axes=...) "
            "with one letter for each axis of the array"
        )


def to_images(array: np.ndarray, axes: str) -> np.ndarray:
    """Copy a chunk into images.

    Parameters
    ----------
    array : ndarray
        uint8, one axis for each letter of `axes`, any strides.
    axes : str
        Roles of its axes.

    Returns
    -------
    ndarray
        uint8 (slices, height, width, 3), C-contiguous, never a view of `array`.
    """
    images = array.transpose([axes.index(axis) for axis in _image_axes(axes)])
    if "c" not in axes:
        images = images[..., None]
    images = images.reshape(-1, *images.shape[-3:])
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else np.array(images, order="C")


def from_images(images: np.ndarray, shape: Sequence[int], axes: str, order: str) -> np.ndarray:
    """Copy images (slices, height, width, 3) into a contiguous chunk of this shape and memory order "C" or "F"."""
    target = _image_axes(axes)
    if "c" not in axes or shape[axes.index("c")] == 1:
        # Mean of three integers, rounded: the fraction is 0, 1/3 or 2/3, so there is no tie to break.
        images = ((images.sum(axis=-1, dtype=np.uint16) + 1) // 3).astype(UINT8)
    chunk = images.reshape([shape[axes.index(axis)] for axis in target])
    return np.array(chunk.transpose([target.index(axis) for axis in axes]), order="F" if order == "F" else "C")


def _image_axes(axes: str) -> str:
    """Return the axes in the order of images: slices first, in the order that the array has them."""
    return "".join(axis for axis in axes if axis not in "yxc") + "yx" + ("c" if "c" in axes else "")


@dataclass(frozen=True, eq=False)
class EncodeJob:
    """A chunk to encode, checked."""

    config: CodecConfig
    array: np.ndarray
    order: str
    inside: tuple[int, ...] | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        """Chunks for one model are encoded together, whatever their quality and semantics."""
        return self.config.decoder, self.config.head

    @property
    def pixels(self) -> int:
        """Slices x height x width."""
        axes = self.config.axes
        return self.array.size // (self.array.shape[axes.index("c")] if "c" in axes else 1)


def encode_job(
    config: CodecConfig, array: np.ndarray, order: str | None = None, inside: Sequence[int] | None = None
) -> EncodeJob:
    """Check a chunk that is to be encoded.

    Parameters
    ----------
    config : CodecConfig
        How to encode it.
    array : ndarray
        The chunk; not copied before the job runs, never written to, and not kept after it.
    order : {"C", "F"}, optional
        Memory order in which decoding is to return the chunk; the array's own by default.
    inside : sequence of int, optional
        How many samples along each axis are data, from the first on; the rest is padding and gets no labels.
    """
    check_chunk(array.shape, array.dtype, config.axes)
    if order is None:  # either name fits an array that is contiguous in both orders
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    return EncodeJob(config, array, order, None if inside is None else tuple(inside))


def run_encode(jobs: Sequence[EncodeJob]) -> list[bytes]:
    """Encode chunks of one key in one call on this thread, past the batcher: for callers that have whole batches."""
    info, runtime = _model(*jobs[0].key)
    encoded = runtime.encode(
        [to_images(job.array, job.config.axes) for job in jobs],
        [job.config.quality for job in jobs],
        labels=any(job.config.semantics == "pre" for job in jobs),
        efforts=[job.config.effort for job in jobs],
    )
    return [_pack(job, one, info) for job, one in zip(jobs, encoded, strict=True)]


def _pack(job: EncodeJob, encoded: "Encoded", info: "ModelInfo") -> bytes:
    config = job.config
    sections = {payload_header.FEATURES: encoded.features}
    if config.semantics == "pre" and encoded.cells is not None:
        height, width = (job.array.shape[config.axes.index(axis)] for axis in "yx")
        tile = config.label_tile or payload_labels.default_tile(height, width)
        cells = encoded.cells if job.inside is None else _without_padding(encoded.cells, config.axes, job)
        scores = payload_labels.tile_scores(cells, tile)
        sections = {payload_header.LABELS: payload_labels.encode_labels(scores, tile), **sections}
    return payload_header.pack(
        dtype=UINT8,
        shape=job.array.shape,
        order=job.order,
        axes=config.axes,
        decoder=bytes.fromhex(info.decoder)[:8],
        # Without semantics no head had a say: readers then look for no labels.
        head=bytes.fromhex(info.head)[:4] if info.head and config.semantics != "none" else bytes(4),
        quality=config.quality,
        grid=encoded.grid,
        sections=sections,
    )


def _without_padding(cells: np.ndarray, axes: str, job: EncodeJob) -> np.ndarray:
    """Return label cells (slices, rows, columns, classes) with no score for those that lie wholly in padding."""
    assert job.inside is not None
    inside = dict(zip(axes, job.inside, strict=True))
    sizes = dict(zip(axes, job.array.shape, strict=True))
    slices = [axis for axis in axes if axis not in "yxc"]
    shaped = cells.reshape(*(sizes[axis] for axis in slices), *cells.shape[1:])
    counts = [*(inside[axis] for axis in slices), *(-(-inside[axis] // payload_header.CELL) for axis in "yx")]
    kept = np.zeros_like(shaped)
    region = tuple(slice(count) for count in counts)
    kept[region] = shaped[region]
    return kept.reshape(cells.shape)


@dataclass(frozen=True, eq=False)
class DecodeJob:
    """A payload to decode, its header and checksums verified."""

    header: payload_header.Header
    features: bytes

    @property
    def key(self) -> bytes:
        """Payloads of one decoder are decoded together."""
        return self.header.decoder

    @property
    def pixels(self) -> int:
        """Slices x height x width."""
        return self.header.slices * self.header.height * self.header.width

    @property
    def images_shape(self) -> tuple[int, int, int]:
        """Slices, height, width."""
        return self.header.slices, self.header.height, self.header.width


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
    header = payload_header.check_payload(payload)
    if header.dtype != UINT8 or header.channels not in CHANNELS:
        raise UnsupportedPayload(
            f"payload of a {header.dtype} chunk with {header.channels} channels: this version decodes uint8 with 1 or "
            "3; upgrade deepsic_codec"
        )
    if shape is not None and tuple(shape) != tuple(header.shape):
        raise CorruptPayload(f"header: payload of a chunk {tuple(header.shape)} where the array has {tuple(shape)}")
    grid = -(-header.height // LATENT_STRIDE), -(-header.width // LATENT_STRIDE)
    if tuple(header.grid) != grid:
        raise CorruptPayload(f"header: symbol grid {tuple(header.grid)} where images of this size have {grid}")
    features = payload_header.read_section(payload, header, payload_header.FEATURES)
    if features is None:
        raise CorruptPayload("section table: there is no feature section")
    return DecodeJob(header, bytes(features))


def run_decode(jobs: Sequence[DecodeJob]) -> list[np.ndarray]:
    """Decode payloads of one key in one call on this thread, past the batcher."""
    _, runtime = _model(jobs[0].key.hex())
    decoded = runtime.decode(*_streams(jobs))
    return [
        from_images(images, job.header.shape, job.header.axes, job.header.order)
        for job, images in zip(jobs, decoded, strict=True)
    ]


def _streams(jobs: Sequence[DecodeJob]) -> tuple[list[bytes], list[tuple[int, int, int]], list[float]]:
    return [job.features for job in jobs], [job.images_shape for job in jobs], [job.header.quality for job in jobs]


def decode_features(job: DecodeJob) -> np.ndarray:
    """Decode a payload to its symbols, int16 (slices, latents, grid rows, grid columns), but not to pixels."""
    _, runtime = _model(job.key.hex())
    return runtime.decode_symbols(*_streams([job]))[0]


def compute_labels(job: DecodeJob, label_tile: tuple[int, int] | None = None) -> payload_labels.LabelBlock:
    """Compute labels from stored features, with the head that the header names, for tiles of this size in pixels."""
    _, runtime = _model(job.key.hex(), job.header.head.hex())
    features, shapes, qualities = _streams([job])
    symbols = runtime.decode_symbols(features, shapes, qualities)
    cells = runtime.label_symbols(symbols, shapes, qualities)[0]
    tile = label_tile or payload_labels.default_tile(job.header.height, job.header.width)
    section = payload_labels.encode_labels(payload_labels.tile_scores(cells, tile), tile)
    return payload_labels.decode_labels(section, job.header)


def _model(decoder: str, head: str | None = None) -> "tuple[ModelInfo, Runtime]":
    # Here and not above: only coding needs torch, and only it may take the seconds that importing torch takes.
    from deepsic_codec.model.file import find_model
    from deepsic_codec.model.runtime import get_runtime

    info = find_model(decoder, head=head)
    return info, get_runtime(info)


def _limit() -> int:
    return settings.get().batch_pixels


ENCODER = Batcher(in_halves(run_encode), _limit)
DECODER = Batcher(in_halves(run_decode), _limit)


def results(outcomes: list[Any]) -> list[Any]:
    """Return what a batcher gave, or raise the first exception in it."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes
