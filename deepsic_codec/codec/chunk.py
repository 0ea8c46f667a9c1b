"""A chunk on its way to a payload: checks, scaled samples, sections, and the model that encodes it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Axes, ceil_div, is_implausible
from deepsic_codec.codec.bands import default_grouping, from_images, label_images, to_images
from deepsic_codec.codec.cast import narrow
from deepsic_codec.codec.labels import Cells, cells_with_data, cells_within, no_cells, tile_embeddings, tile_labels
from deepsic_codec.codec.params import AUTO_TRANSFORM, DEFAULT_QUALITY, DEFAULT_TUNE, NO_SPECTRAL, CodecParams
from deepsic_codec.codec.quality_map import (
    Keep,
    Qualities,
    check_mapped,
    constant_quality,
    kept_qualities,
    map_on,
)
from deepsic_codec.codec.scaled import DTYPES, UINT8, check_finite, check_values, scale_chunk, unscale
from deepsic_codec.errors import ConfigurationError, UnsupportedArray
from deepsic_codec.payload.cast import Cast
from deepsic_codec.payload.constants import LATENT_STRIDE, MAX_QUALITY
from deepsic_codec.payload.embedding import Embedding
from deepsic_codec.payload.fields import COLOURS, MAX_BANDS, MAX_SAMPLES, PLANES
from deepsic_codec.payload.header import pack
from deepsic_codec.payload.labels import LabelBlock
from deepsic_codec.payload.limits import check_size
from deepsic_codec.payload.sections import CAST, EMBEDDING, FEATURES, LABELS, NODATA, VALUE_RANGE, Section

if TYPE_CHECKING:
    from deepsic_codec.model.batch import Encoded, Scheduler
    from deepsic_codec.model.file import ModelInfo


# What to propose for a number of axes.
LIKELY = {
    2: ", such as axes='yx'",
    3: ", such as axes='yxc' for bands last, 'cyx' for bands first, or 'zyx'",
    4: ", such as axes='tyxc' for bands last, 'tcyx' for bands before rows, or 'czyx'",
}


def transform_of(params: CodecParams, dtype: np.dtype[Any], bands: int) -> str:
    """Return how chunks of a dtype are coded: `"features"`, `"wavelet"`, or `"auto"`, whichever takes fewer bytes."""
    if params.transform != AUTO_TRANSFORM:
        return params.transform
    fixed = params.rmse, params.value_range, params.label_bands
    if dtype != UINT8 or bands != 3 or any(parameter is not None for parameter in fixed):
        return "wavelet"
    if params.quality is not None and params.quality > MAX_QUALITY:
        return "wavelet"
    return AUTO_TRANSFORM if params.tune == DEFAULT_TUNE else "features"  # wavelets cannot be tuned


def check_chunk(shape: Sequence[int], dtype: np.dtype[Any], params: CodecParams) -> None:
    """Raise UnsupportedArray or ConfigurationError unless chunks of this shape and dtype can be encoded."""
    axes = Axes(params.axes)
    if len(shape) == 1 and np.dtype(dtype).newbyteorder("=") in DTYPES:
        raise UnsupportedArray(
            f"the chunk is flat ({shape[0]} samples), but axes={params.axes!r} needs {len(params.axes)} axes; a "
            "filter before DeepSIC lost the shape, so use DeepSIC without filters"
        )
    bands = axes.bands(shape) if len(shape) == len(axes) else 1
    check_values(dtype, params, bands)
    check_axes(shape, params.axes)
    if bands > MAX_BANDS:
        raise UnsupportedArray(
            f"chunk {tuple(shape)} with axes {params.axes!r} has {bands} bands; choose chunks of at most "
            f"{MAX_BANDS} bands"
        )
    if not 0 < prod(shape) <= MAX_SAMPLES:
        raise UnsupportedArray(f"chunk {tuple(shape)}: expected 1 to {MAX_SAMPLES} samples; choose other chunks")


def implausible_axes(shape: Sequence[int], axes: str) -> str | None:
    """Return a message for chunks whose axes are probably others, None for other chunks."""
    if not is_implausible(axes, shape):
        return None
    rows, columns, bands = shape
    return (
        f"chunk {tuple(shape)}: axes={str(axes)!r} means {rows} rows and {columns} columns of {bands} bands; if these "
        f"are {rows} bands or slices of images, pass DeepSIC(axes='cyx') or axes='zyx'; if not, choose chunks of "
        "another width"
    )


def check_axes(shape: Sequence[int], axes: str) -> None:
    """Raise UnsupportedArray unless `axes` names every axis of this shape."""
    if len(shape) != len(axes):
        raise UnsupportedArray(
            f"shape {tuple(shape)} has {len(shape)} axes, but axes={str(axes)!r} names {len(axes)}; pass "
            f"DeepSIC(axes=...) with one letter for each axis of the array{LIKELY.get(len(shape), '')}"
        )


def load_model(decoder: str, head: str | None = None, name: str | None = None) -> "tuple[ModelInfo, Scheduler]":
    """Return a model and its scheduler; `name` chooses among several models with this decoder and head."""
    info = find_info(decoder, head, name)
    return info, scheduler_of(info)


def find_info(decoder: str, head: str | None = None, name: str | None = None) -> "ModelInfo":
    """Return a model; `name` chooses among several models with this decoder and head."""
    from deepsic_codec.model.zoo import find_model

    return find_model(decoder, head=head, preferred=name)


def scheduler_of(info: "ModelInfo") -> "Scheduler":
    """Return the scheduler of a model."""
    # Late: only features and labels need a model.
    from deepsic_codec.model.scheduler import get_scheduler

    return get_scheduler(info)


@dataclass(frozen=True, eq=False)
class ChunkToEncode:
    """A chunk that passed all checks; see `prepare_chunk`."""

    params: CodecParams  # with the identity of the model
    array: NDArray[Any]
    order: str
    valid_shape: tuple[int, ...] | None = None  # None: without padding
    quality_map: NDArray[np.float32] | None = None  # (all axes but that of the bands)
    keep: Keep = ()
    cast: Cast | None = None  # what `array` becomes after decoding

    @cached_property
    def axes(self) -> Axes:
        """Axes of the array."""
        return Axes(self.params.axes)

    @property
    def key(self) -> tuple[str, str | None, str]:
        """Chunks of one model are encoded together, whatever their quality and semantics."""
        return *self.params.identity(), self.params.model

    @property
    def pixels(self) -> int:
        """Pixels of all images that the networks see."""
        return self.axes.pixels(self.array.shape) * self.images

    @property
    def bands(self) -> int:
        """Samples of a pixel."""
        return self.axes.bands(self.array.shape)

    @cached_property
    def undecided(self) -> bool:
        """Whether features may take fewer bytes than wavelets, or more (`transform.choose_transforms`)."""
        return self._transform == AUTO_TRANSFORM

    @cached_property
    def features(self) -> bool:
        """Whether the chunk is coded, or may be coded, as features, not as wavelets or within a bound."""
        return self._transform != "wavelet"

    @cached_property
    def _transform(self) -> str:
        if self.params.max_error is not None or self.quality_map is not None or self.keep:
            return "wavelet"
        return transform_of(self.params, self.array.dtype, self.bands)

    @property
    def grouping(self) -> int:
        """How bands are joined to images."""
        if not self.features or self.bands == 1:
            return COLOURS
        return PLANES if self.params.spectral == NO_SPECTRAL else default_grouping(self.bands)

    @property
    def images(self) -> int:
        """Images of a slice, or what takes as much memory as they do."""
        if not self.features:
            return ceil_div(self.bands, 3)
        return self.bands if self.grouping == PLANES else 1


def prepare_chunk(
    params: CodecParams,
    array: NDArray[Any],
    order: str | None = None,
    valid_shape: Sequence[int] | None = None,
    quality_map: Any = None,
    keep: Keep = (),
) -> ChunkToEncode:
    """Check a chunk that is to be encoded.

    Parameters
    ----------
    params : CodecParams
        How to encode it.
    array : ndarray
        The chunk. It is not copied before it is encoded, never written to, and not kept afterwards.
    order : {"C", "F"}, optional
        Memory order in which decoding returns the chunk; the array's order by default.
    valid_shape : sequence of int, optional
        Samples along each axis that are data, from the first; the rest is padding and gets no labels.
    quality_map : array_like, optional
        As `map_on` takes it.
    keep : sequence of (Condition, float)
        Qualities of what labels find.

    Raises
    ------
    UnsupportedArray
        For a dtype, a shape, or values that cannot be encoded.
    ConfigurationError
        For parameters that do not fit the array.
    """
    check_chunk(array.shape, array.dtype, params)
    if message := implausible_axes(array.shape, params.axes):
        warnings.warn(message, stacklevel=3)  # zarr and xarray made the array: here it is too late to refuse it
    check_finite(array, params)
    if order is None:  # either name fits an array that is contiguous in both orders
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    params, valid_shape = params.resolved(), None if valid_shape is None else tuple(valid_shape)
    if quality_map is not None or keep:
        check_mapped(params)
    if quality_map is not None:
        quality_map = map_on(quality_map, Axes(params.axes), array.shape, params)
        constant = constant_quality(quality_map)
        if constant is not None and not keep:
            params = params if params.quality is None else params.changed(quality=constant)
            quality_map = None
    params, array, cast = narrow(params, array)
    chunk = ChunkToEncode(params, array, order, valid_shape, quality_map, tuple(keep), cast)
    height, width = chunk.axes.height(array.shape), chunk.axes.width(array.shape)
    check_size(chunk.pixels // (height * width), height, width, UnsupportedArray)
    return chunk


class EncodeTask:
    """A chunk, scaled, and the model that encodes it."""

    def __init__(self, chunk: ChunkToEncode, info: "ModelInfo") -> None:
        self.chunk, self.info, self.params = chunk, info, chunk.params
        self.cells: Cells | None = None  # of `label_images`, where there are no features
        self.scaled = scale_chunk(chunk.axes.to_samples(chunk.array), chunk.params, chunk.features)
        if chunk.quality_map is not None:
            axes = Axes("".join(axis for axis in chunk.axes if axis != "c"))
            self._set_qualities(axes.to_samples(chunk.quality_map))

    def _set_qualities(self, qualities: Qualities) -> None:
        """Give each pixel a quality, and none to those without data."""
        if self.scaled.mask is not None:
            qualities = np.where(self.scaled.mask.all(axis=-1, keepdims=True), np.float32(0), qualities)
        self.scaled = replace(self.scaled, qualities=np.ascontiguousarray(qualities))

    def keep_labels(self) -> None:
        """Give the pixels of label cells that satisfy a condition its quality."""
        assert self.cells is not None
        cells, vocabulary = cells_with_data(self.cells, self.scaled.mask), self.info.vocabulary
        quality = DEFAULT_QUALITY if self.params.quality is None else self.params.quality
        others = quality if self.scaled.qualities is None else self.scaled.qualities

        def score(name: str) -> NDArray[np.uint8]:
            return vocabulary.score(name, lambda number: cells[..., number])

        qualities = kept_qualities(self.chunk.keep, score, self.scaled.samples.shape[:3], others)
        self._set_qualities(qualities)

    @property
    def quality(self) -> float:
        """Quality of the features; where a search starts, for a chunk that has a target instead."""
        return min(MAX_QUALITY, DEFAULT_QUALITY if self.params.quality is None else self.params.quality)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Number, height and width of the images that the networks see."""
        slices, height, width, _ = self.scaled.samples.shape
        return slices * self.chunk.images, height, width

    @property
    def q6(self) -> bool:
        """Whether the networks see 64ths of a grey level."""
        return self.scaled.ranges is not None

    def label_images(self) -> NDArray[Any]:
        """Return the images (slices, height, width, 3) that labels are scored on where there are no features."""
        scaled = self.scaled
        return label_images(scaled.samples, scaled.ranges, scaled.mask, self.params.label_numbers)

    def images(self) -> NDArray[Any]:
        """Return the images that the networks see, (images, height, width, 3)."""
        return to_images(self.scaled.bands, self.chunk.grouping)

    def decode(self, images: NDArray[Any] | None) -> NDArray[Any]:
        """Return what reconstructed images (images, height, width, 3) decode to, before NoData."""
        assert images is not None
        return unscale(from_images(images, self.chunk.bands, self.chunk.grouping), self.scaled.ranges)

    def pack(self, encoded: "Encoded") -> bytes:
        """Return the payload of features."""
        cells = None if encoded.cells is None else encoded.cells[:: self.chunk.images]
        quality, trellis = encoded.quantiser
        return self.pack_sections({FEATURES: encoded.features}, quality, cells, trellis)

    def pack_sections(
        self, coded: dict[Section[Any], Any], quality: float, cells: Cells | None = None, trellis: bool = False
    ) -> bytes:
        """Return the payload of coded sections, with label cells of its slices; content that is None is left out."""
        chunk, params, info = self.chunk, self.params, self.info
        _, height, width, _ = self.scaled.samples.shape
        cells = self._cells(cells)
        sections: dict[Section[Any], Any] = {
            LABELS: self._labels(cells),
            EMBEDDING: self._embedding(cells),
            VALUE_RANGE: self.scaled.ranges,
            NODATA: self.scaled.nodata,
            CAST: chunk.cast,
            **coded,
        }
        return pack(
            dtype=chunk.array.dtype,
            shape=chunk.array.shape,
            order=chunk.order,
            axes=params.axes,
            decoder=bytes.fromhex(info.decoder)[:8],
            # Without semantics no head scored the chunk, and readers look for no labels.
            head=bytes.fromhex(info.head)[:4] if info.head and params.semantics != "none" else bytes(4),
            quality=quality,
            grid=(ceil_div(height, LATENT_STRIDE), ceil_div(width, LATENT_STRIDE)),
            sections={section: content for section, content in sections.items() if content is not None},
            grouping=chunk.grouping,
            trellis=trellis,
        )

    @property
    def needs_cells(self) -> bool:
        """Whether the payload stores labels or embeddings."""
        return self.params.semantics == "pre" or self.params.embedding

    def _cells(self, cells: Cells | None) -> Cells | None:
        """Return scored cells, with 0 where there is no data; None without scores of a chunk with data."""
        slices, height, width, _ = self.scaled.samples.shape
        if self.scaled.empty:
            return no_cells(slices, height, width, outputs=1)
        if cells is None:
            return None
        cells = cells_with_data(cells, self.scaled.mask)
        if self.chunk.valid_shape is not None:
            cells = cells_within(cells, self.chunk.axes, self.chunk.array.shape, self.chunk.valid_shape)
        return cells

    def _labels(self, cells: Cells | None) -> LabelBlock | None:
        if cells is None or self.params.semantics != "pre":
            return None
        _, height, width, _ = self.scaled.samples.shape
        return tile_labels(
            cells, self.info.vocabulary, height, width, self.params.label_tile, self.params.label_pooling
        )

    def _embedding(self, cells: Cells | None) -> Embedding | None:
        if cells is None or not self.params.embedding or self.scaled.empty:
            return None
        _, height, width, _ = self.scaled.samples.shape
        if cells.shape[-1] == len(self.info.vocabulary.names):
            raise ConfigurationError(
                f"embedding: the head of model {self.info.name!r} has no embeddings; use one that has, or leave it out"
            )
        return tile_embeddings(cells, self.info.vocabulary, height, width, self.params.label_tile)
