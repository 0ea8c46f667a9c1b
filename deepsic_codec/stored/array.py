"""An array stored with DeepSIC, and the properties that its metadata determine."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import zarr

from deepsic_codec.axes import Axes, Index
from deepsic_codec.codec.decode import PayloadToDecode, parse_payload
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.errors import DeepSICError, RefusedCodec, UnsupportedArray
from deepsic_codec.stored import coordinates
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.layout import StoredLayout, codec_names
from deepsic_codec.stored.location import (
    Counter,
    CountingStore,
    is_deepsic,
    listed,
    members,
    metadata_errors,
    open_node,
    url_of,
)
from deepsic_codec.stored.reader import CONCURRENCY, PayloadReader

ATTRIBUTE = "deepsic"  # of arrays: identity, and vocabulary, so that labels can be read where the model is missing


class StoredArray:
    """An array whose chunks are payloads of DeepSIC.

    Public functions create one and pass it on, so that the codecs, axes and keys of an array are parsed once.

    `counter` counts the reads of its `reader`, with `concurrency` reads in flight. `decoder` and `head` are the SHA-256
    of the model in hexadecimal; `head` may be None.

    Raises
    ------
    UnsupportedPayload
        If the array is not stored with DeepSIC.
    """

    def __init__(self, array: zarr.Array, *, counter: Counter | None = None, concurrency: int = CONCURRENCY) -> None:
        self.array = array
        self.layout = StoredLayout(array)
        self.params: CodecParams = self.layout.params
        self.axes = Axes(self.params.axes)
        self.decoder, self.head = self.params.identity()
        self._counter, self._concurrency = counter, concurrency

    @classmethod
    def open(
        cls, source: Any, name: str | None = None, *, counter: Counter | None = None, **kwargs: Any
    ) -> "StoredArray":
        """Open the one array stored with DeepSIC that a source is or has; of a pyramid, the full resolution.

        Takes the arguments of `deepsic_codec.stored.location.open_node`; `counter` also counts what `reader` reads.

        Raises
        ------
        UnsupportedArray
            If there is none or more than one.
        UnsupportedPayload
            If `source` is an array that is stored otherwise.
        """
        arrays = stored_arrays(open_node(source, name, counter=counter, **kwargs), counter=counter)
        if len(arrays) > 1:
            names = listed([array.path for array in arrays])
            raise UnsupportedArray(f"expected one array stored with DeepSIC, found {names}; pass name= for one of them")
        return arrays[0]

    def counting(self, counter: Counter) -> "StoredArray":
        """Return the same array with a `reader` whose reads are counted."""
        return StoredArray(self.array, counter=counter, concurrency=self._concurrency)

    @property
    def path(self) -> str:
        """Path of the array in its store."""
        return self.array.path

    @property
    def shape(self) -> Index:
        """Shape of the array."""
        return self.array.shape

    @property
    def chunks(self) -> Index:
        """Shape of a chunk."""
        return self.layout.chunks

    @property
    def grid(self) -> Index:
        """Chunks along each axis."""
        return self.layout.grid

    @cached_property
    def geometry(self) -> Geometry:
        """Chunks and label tiles."""
        return Geometry.of(self.array, self.axes, self.params.label_tile)

    @cached_property
    def reader(self) -> PayloadReader:
        """Reads payloads."""
        store = self.array.store_path.store
        if self._counter is not None:
            store = CountingStore(store, self._counter)
        return PayloadReader(store, self.layout, self._concurrency)

    def fingerprint(self, *, fresh: bool = False) -> str:
        """Return a SHA-256 of the array's identity, codec and dtype; one that was made in its place has another.

        `create_array` gives each array an identity. With `fresh`, the metadata are read again, in one request.
        """
        stored = self
        if fresh:
            path = self.array.store_path
            # Mode "r" would reopen a store that can write, which a zip file being written cannot bear.
            mode: Any = "r" if path.store.read_only else "r+"
            with metadata_errors(path):
                array = zarr.open_array(path, mode=mode, zarr_format=self.array.metadata.zarr_format)
            stored = StoredArray(array)
        attribute = stored.array.attrs.get(ATTRIBUTE)
        identity = attribute.get("id") if isinstance(attribute, Mapping) else None
        dtype = stored.array.dtype.newbyteorder("=").str
        about = json.dumps([identity, stored.params.to_json(), dtype], sort_keys=True)
        return sha256(about.encode()).hexdigest()

    @property
    def dimension_names(self) -> list[str]:
        """Names of the dimensions: those in the metadata, or the letters of the axes."""
        return dimension_names(self.array, self.axes)

    @cached_property
    def described(self) -> tuple[dict[str, Any], coordinates.Coordinates]:
        """Attributes of the array and coordinates beside it, completed by one another."""
        attributes = {key: value for key, value in self.array.attrs.asdict().items() if key != ATTRIBUTE}
        names = self.dimension_names
        return coordinates.describe(attributes, coordinates.read(self.array, names), self.axes, names, self.shape)

    @property
    def fill_value(self) -> Any:
        """Value of missing chunks: 0 where format 2 has none, as zarr reads it."""
        return 0 if self.array.fill_value is None else self.array.fill_value

    def parse(self, payload: bytes) -> PayloadToDecode:
        """Verify a payload of this array that is to be decoded; raises the errors of `parse_payload`."""
        return parse_payload(payload, self.chunks, self.array.dtype, self.params)

    def indices(self) -> Iterator[Index]:
        """Iterate over the positions of all chunks, the last axis fastest."""
        return np.ndindex(*self.grid)


def stored_arrays(node: Any, **kwargs: Any) -> list[StoredArray]:
    """Return the arrays stored with DeepSIC that a node of Zarr is or has, ordered by path.

    Of the pyramids in a group, only the first levels count, which have the full resolution.

    Raises
    ------
    UnsupportedArray
        If a group has none.
    UnsupportedPayload
        If an array is stored otherwise.
    """
    if isinstance(node, zarr.Array):
        return [StoredArray(node, **kwargs)]
    arrays, refused = [], None
    nodes = [("", node), *members(node)]
    coarser = _coarser_levels(nodes)
    for path, member in nodes:
        if isinstance(member, zarr.Array) and path not in coarser:
            try:
                arrays.append(StoredArray(member, **kwargs))
            except RefusedCodec as error:
                refused = error if "deepsic" in codec_names(member) else refused
            except DeepSICError:
                pass
    if not arrays and refused is not None:
        raise refused
    if not arrays:
        raise UnsupportedArray(f"{url_of(node.store_path)} has no array stored with DeepSIC")
    return sorted(arrays, key=lambda array: array.path)


def _coarser_levels(nodes: Sequence[tuple[str, Any]]) -> set[str]:
    """Return the paths of all levels of pyramids but the first, which OME-NGFF orders by resolution."""
    arrays = {path for path, node in nodes if is_deepsic(node)}
    coarser: set[str] = set()
    for path, node in nodes:
        if isinstance(node, zarr.Group):
            levels = [f"{path}/{level}".lstrip("/") for level in _levels(node.attrs.asdict())]
            coarser |= {*levels[1:]} - {levels[0]} if arrays.issuperset(levels[:1]) and levels else set()
    return coarser


def _levels(attributes: Mapping[str, Any]) -> list[str]:
    """Return the paths of the levels of the pyramid that the attributes of a group describe; none if it is damaged."""
    try:
        datasets = attributes.get("ome", attributes)["multiscales"][0]["datasets"]
        return [str(dataset["path"]) for dataset in datasets]
    except (AttributeError, LookupError, TypeError):
        return []


def dimension_names(array: zarr.Array, axes: str) -> list[str]:
    """Return the names of the dimensions of any array: those in its metadata, or the letters of its axes."""
    names: Any = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if not isinstance(names, list | tuple) or len(names) != len(axes):
        names = axes
    return [str(name or axis) for name, axis in zip(names, axes, strict=True)]
