"""Make a label index from the headers of all chunks."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
import zarr
from zarr.storage import StorePath

from deepsic_codec.axes import Index, iter_grid
from deepsic_codec.errors import LabelIndexError, RefusedCodec, UnsupportedPayload, counted
from deepsic_codec.labels.attributes import Attributes, check_tile
from deepsic_codec.labels.index import FEATURES, HEADER, UNLABELLED, Entries, LabelIndex
from deepsic_codec.labels.index_writer import IndexWriter, replace
from deepsic_codec.labels.learned_label import LearnedLabel
from deepsic_codec.labels.query import Labels
from deepsic_codec.labels.vocabulary import vocabulary_of
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.payload.limits import check_count, check_size
from deepsic_codec.progress import Progress
from deepsic_codec.stored.array import StoredArray, stored_arrays
from deepsic_codec.stored.location import IndexLocation, open_node, parent_and_name, remote_errors
from deepsic_codec.stored.reader import CONCURRENCY, PayloadStart

Starts = Callable[[Iterable[Index]], Iterator[tuple[Index, PayloadStart | None]]]
Fill = Callable[[Entries, list[Index]], None]


def consolidate_labels(
    source: Any,
    name: str | None = None,
    *,
    index: Any = None,
    keep: bool = True,
    progress: Progress | None = None,
    concurrency: int = CONCURRENCY,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Read the headers of all chunks and write the label index that makes queries fast.

    Run it again after chunks were written. The new index becomes valid when it is complete. Until then, and after a
    failure, an earlier index stays valid.

    Parameters
    ----------
    source
        An array, or a group with any number of them: a URL, path or store as `zarr.open` takes, or an array or group
        of Zarr. Of pyramids, only the full resolution is indexed.
    name : str, optional
        Path of an array in the group, or of a group in it.
    index : optional
        Location of the index, if it does not go to the group `<name>_labels` beside the array: a Zarr group, or an
        argument of `zarr.open_group`. Required for an array at the root of its store.
    keep : bool
        Keep the entries that `relabel` wrote of chunks that were not written again since.
    progress : callable, optional
        Called with the number of chunks done and of all chunks, separately for each array of a group.
    concurrency : int
        Reads in flight.
    storage_options : dict, optional
        For fsspec, if `source` or `index` is a URL.

    Returns
    -------
    Labels or dict of str to Labels
        Labels of the array; for a group, a dict from the path of each array.

    Raises
    ------
    LabelIndexError
        If an index cannot be written to the location, there is no location beside the array, or chunks have labels of
        different vocabularies.
    UnsupportedPayload, CorruptPayload
        If a chunk is damaged or of another codec.
    UnsupportedArray
        If there is no array stored with DeepSIC.
    """
    node = open_node(source, name, mode="r" if index is not None else "r+", options=storage_options)
    arrays = stored_arrays(node, concurrency=concurrency)
    if index is not None and len(arrays) > 1:
        raise LabelIndexError(f"index: one location for {len(arrays)} arrays; pass the name of one of them")
    result = {}
    for stored in arrays:
        location = location_for(stored.array, index, storage_options)
        update_index(stored, location, keep=keep, progress=progress)
        result[stored.path] = Labels(stored, LabelIndex(location), compared=True)
    return next(iter(result.values())) if isinstance(node, zarr.Array) else result


def location_for(array: zarr.Array, index: Any, options: Mapping[str, Any] | None) -> IndexLocation:
    """Return the location for the index of an array; raises LabelIndexError if none can be written."""
    if index is not None:
        location = IndexLocation.from_user(index, array.metadata.zarr_format, options, write=True)
    else:
        location = IndexLocation.sibling_of(array, check=True)
    if location.store.read_only:
        raise LabelIndexError(
            f"{location}: the store is open for reading only; pass another location (index=...), or scan the "
            "headers (open_labels(array, scan=True))"
        )
    return location


def update_index(
    stored: StoredArray,
    location: IndexLocation,
    *,
    keep: bool = True,
    starts: Starts | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the index of an array, from the headers of its chunks; an earlier one stays valid until it is complete.

    Parameters
    ----------
    stored : StoredArray
        The array.
    location : IndexLocation
        Where the index goes.
    keep : bool
        Keep entries made from features where the chunk is still the same.
    starts : callable, optional
        Yields the starts of payloads, as `stored.reader.starts` does, which is the default.
    progress : callable, optional
        Called with the number of chunks done and of all chunks.
    """
    with remote_errors(StorePath(location.store, location.path), write=True):
        old = existing_index(location) if keep else None
        replace(location, lambda target: write_index(stored, target, old=old, starts=starts, progress=progress))


def existing_index(location: IndexLocation) -> LabelIndex | None:
    """Open an index, None if there is none that can be read."""
    try:
        return LabelIndex(location)
    except (LabelIndexError, RefusedCodec):
        return None


def kept_labels(old: LabelIndex | None, vocabulary: Vocabulary) -> list[LearnedLabel]:
    """Return the learned labels of an index that another of this vocabulary can have; warns about others."""
    if old is None:
        return []
    names = {*vocabulary.known}
    kept = [one for one in old.learned if one.head == vocabulary.head and one.name not in names]
    if dropped := [one.name for one in old.learned if one not in kept]:
        warnings.warn(
            f"{old.location}: learned labels {', '.join(dropped)} are of another head and left out; learn them again",
            stacklevel=6,
        )
    return kept


def write_index(
    stored: StoredArray,
    location: IndexLocation,
    *,
    old: LabelIndex | None = None,
    starts: Starts | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the index of an array, from the headers of its chunks, where there is none.

    Parameters
    ----------
    stored, location, starts, progress
        As for `update_index`.
    old : LabelIndex, optional
        Entries made from features are taken from it where the chunk is still the same.
    """
    geometry = stored.geometry
    axes, chunks = geometry.axes, geometry.chunks
    check_count(geometry.count, "reading the labels of all chunks", LabelIndexError)
    images = prod(axes.slice_shape(chunks))
    check_size(images, axes.height(chunks), axes.width(chunks), UnsupportedPayload)
    learned_before = old
    if old is not None and not old.counts.get("features"):
        old = None
    if old is not None and (old.geometry.axes, old.geometry.chunks, old.geometry.tile) != (
        geometry.axes,
        geometry.chunks,
        geometry.tile,
    ):
        old = None
    vocabulary = vocabulary_of(stored.array, stored.decoder, stored.head) if old is None else old.vocabulary
    vocabulary = vocabulary.with_learned(())
    read = partial(stored.reader.starts, vectors=stored.params.embedding)
    filler = _FromHeaders(stored, starts or read, vocabulary, old)
    fill_index(stored, location, vocabulary, filler, progress, kept_labels(learned_before, vocabulary))
    if filler.foreign:
        warnings.warn(
            f"labels of {counted(filler.foreign, 'chunk')} are of another vocabulary than the index, which was "
            "made from features; run relabel to label them too",
            stacklevel=4,
        )


def fill_index(
    stored: StoredArray,
    location: IndexLocation,
    vocabulary: Vocabulary,
    fill: Fill,
    progress: Progress | None = None,
    learned: Sequence[LearnedLabel] = (),
) -> None:
    """Write an index unit by unit; `fill` sets the entries of the chunks that it gets, `learned` are more labels."""
    stored.layout.check_first()
    geometry = stored.geometry
    name = parent_and_name(stored.array.store_path)[1]
    about = {"name": name, "decoder": stored.decoder, "fingerprint": stored.fingerprint(fresh=True)}
    vocabulary = vocabulary.with_learned(one.name for one in learned)
    writer = IndexWriter(location, geometry, vocabulary, about, learned)
    done = 0
    for start, stop in writer.chunking.units(geometry.grid):
        entries = Entries(geometry, len(vocabulary.names), start, stop)
        chunks = list(iter_grid(start, stop))
        for k in range(0, len(chunks), 1024):
            fill(entries, chunks[k : k + 1024])
            done += len(chunks[k : k + 1024])
            if progress is not None:
                progress(done, geometry.count)
        writer.write(entries)
    writer.finish()


class _FromHeaders:
    """Sets entries from the headers of chunks; entries made from features are copied from an earlier index."""

    def __init__(self, stored: StoredArray, starts: Starts, vocabulary: Vocabulary, old: LabelIndex | None) -> None:
        self.stored, self.starts, self.vocabulary, self.old = stored, starts, vocabulary, old
        self.geometry, self.attributes = stored.geometry, Attributes(stored)
        self.foreign = 0
        self._old_unit: Entries | None = None

    def __call__(self, entries: Entries, chunks: list[Index]) -> None:
        for index, head in self.starts(chunks):
            if head is None:
                continue
            common = {"crc": head.crc, "nbytes": head.header.nbytes}
            kept = self._kept(entries, index, head)
            if kept is not None:
                scores, vectors, number = kept
                entries.set(index, scores, vectors, source=FEATURES, head=number, **common)
                continue
            with self.stored.reader.error_context(index):
                scores, vectors = self._scores(index, head), self._vectors(index, head)
            source = UNLABELLED if scores is None else HEADER
            entries.set(index, scores, vectors, source=source, head=0 if scores is None else head.head_id, **common)

    def _scores(self, index: Index, head: PayloadStart) -> Any:
        block = head.labels()
        if block is None:
            return None
        names = self.attributes.vocabulary(head.header).names
        if names != self.vocabulary.names:
            if self.old is not None:
                self.foreign += 1
                return None
            raise LabelIndexError(
                f"chunk {index} of array {self.stored.path!r} was labelled by head {head.header.head.hex()}, whose "
                f"classes differ from those of head {self.vocabulary.head[:8]} of the array; write the chunk again, "
                "or relabel the array"
            )
        check_tile("labels section", block.tile, head, self.geometry)
        return self.geometry.arrange(block.dense(len(names)), index)

    def _vectors(self, index: Index, head: PayloadStart) -> Any:
        if self.foreign_head(head):
            return None
        embedding = head.embedding()
        if embedding is None:
            return None
        check_tile("embedding section", embedding.tile, head, self.geometry)
        return self.geometry.arrange(embedding.vectors, index)

    def foreign_head(self, head: PayloadStart) -> bool:
        """Tell whether another head than that of the vocabulary labelled a chunk: its embeddings cannot be compared."""
        return not self.vocabulary.head.startswith(head.header.head.hex())

    def _kept(self, entries: Entries, index: Index, head: PayloadStart) -> tuple[Any, Any, int] | None:
        if self.old is None:
            return None
        if self._old_unit is None or self._old_unit.start != entries.start:
            stop = tuple(min(b, n) for b, n in zip(entries.stop, self.old.geometry.grid, strict=True))
            if any(a >= b for a, b in zip(entries.start, stop, strict=True)):
                return None
            try:
                self._old_unit = self.old.block(entries.start, stop)
            except (LabelIndexError, RefusedCodec) as error:
                raise LabelIndexError(
                    f"{error}; pass keep=False to make the index without its labels from features"
                ) from error
        old = self._old_unit
        if any(i >= b for i, b in zip(index, old.stop, strict=True)):
            return None
        position = tuple(i - a for i, a in zip(index, old.start, strict=True))
        if old.source[position] != FEATURES or old.crc[position] != head.crc:
            return None
        scores = old.tiles[(slice(None), *old.tile_region(index))]
        if scores.shape[1:] != entries.tiles[(slice(None), *entries.tile_region(index))].shape[1:]:
            return None  # the array was resized: its edge was in this chunk, or is now
        vectors = None if old.embeddings is None else np.moveaxis(old.embeddings[old.tile_region(index)], -1, 0)
        return scores, vectors, int(old.head[position])
