"""Compute labels from stored features: no pixel is reconstructed and no chunk is written, only the index."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from deepsic_codec.axes import Index
from deepsic_codec.codec.decode import PayloadToDecode, compute_cells
from deepsic_codec.codec.labels import Cells, tile_embeddings, tile_labels
from deepsic_codec.errors import ModelMismatch
from deepsic_codec.labels.attributes import label_batch_size
from deepsic_codec.labels.consolidate import existing_index, fill_index, kept_labels, location_for
from deepsic_codec.labels.index import FEATURES, Entries, LabelIndex
from deepsic_codec.labels.index_writer import replace
from deepsic_codec.labels.query import Labels
from deepsic_codec.progress import Progress
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.reader import PayloadStart

if TYPE_CHECKING:
    from deepsic_codec.model.file import ModelInfo


def relabel(
    source: Any,
    head: Any = None,
    name: str | None = None,
    *,
    index: Any = None,
    progress: Progress | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Labels:
    """Compute new labels for all chunks from their features, and write an index with these labels.

    For archives written with `semantics="post"`, and for any new head that was trained on the decoder of the archive.
    `consolidate_labels` keeps the labels of chunks that are not written again.

    Parameters
    ----------
    source
        The array or a group that has it: a URL, path or store as `zarr.open` takes, or an array or group of Zarr.
    head : str or path, optional
        The head: the name of a head or of a model that has it, the first digits of its SHA-256, or a file of either. By
        default the head of the array, which may be embedded in the archive.
    name : str, optional
        Path of the array in the group.
    index : optional
        Location of the index, if it does not go beside the array.
    progress : callable, optional
        Called with the number of chunks done and of all chunks.
    storage_options : dict, optional
        For fsspec, if `source` or `index` is a URL.

    Returns
    -------
    Labels
        The labels of the array, for queries.

    Raises
    ------
    ModelNotFound, ModelMismatch
        If there is no such head, or it is for another decoder than that of the chunks.
    LabelIndexError
        If an index cannot be written to the location, or there is no location beside the array.
    CorruptPayload, UnsupportedPayload
        If a chunk is damaged or of another codec.
    """
    stored = StoredArray.open(source, name, mode="r" if index is not None else "r+", options=storage_options)
    info = _find(head, stored)
    location = location_for(stored.array, index, storage_options)
    labeller = _Labeller(stored, info)
    learned = kept_labels(existing_index(location), info.vocabulary)
    replace(location, lambda target: fill_index(stored, target, info.vocabulary, labeller, progress, learned))
    return Labels(stored, LabelIndex(location))


def _find(head: Any, stored: StoredArray) -> "ModelInfo":
    """Return the model of the array with a head."""
    from deepsic_codec.model.zoo import find_head, find_model

    if head is None:
        info = embedded.use_embedded(stored.array)
        return info or find_model(stored.decoder, head=stored.head)  # raises ModelNotFound, which names the model
    if not isinstance(head, Path) and not str(head).endswith(".safetensors"):
        return find_model(stored.decoder, head=find_head(head, stored.decoder))
    from deepsic_codec.model.file import HeadInfo, read_file

    described = read_file(head)
    if isinstance(described, HeadInfo):
        return find_model(stored.decoder).with_head(described)
    if described.decoder != stored.decoder:
        raise ModelMismatch(
            f"model {described.name!r} has decoder {described.decoder[:16]}, but the array has {stored.decoder[:16]}; "
            "use a head for the decoder of the array"
        )
    return described


class _Labeller:
    """Sets entries from the features of chunks."""

    def __init__(self, stored: StoredArray, info: "ModelInfo") -> None:
        from deepsic_codec.model.scheduler import get_scheduler

        self.stored, self.reader, self.geometry, self.info = stored, stored.reader, stored.geometry, info
        self.runtime = get_scheduler(info)
        self.head_id = int(info.head[:8], 16)

    def __call__(self, entries: Entries, chunks: list[Index]) -> None:
        count = label_batch_size(self.stored)
        for k in range(0, len(chunks), count):
            payloads = [
                (index, payload)
                for index, payload in self.reader.payloads(chunks[k : k + count])
                if payload is not None
            ]
            for (index, payload), tiles in zip(payloads, self._tiles(payloads), strict=True):
                start = PayloadStart.of(payload)
                scores, vectors = tiles
                common = {"crc": start.crc, "nbytes": start.header.nbytes}
                entries.set(index, scores, vectors, source=FEATURES, head=self.head_id, **common)

    def _tiles(self, payloads: list[tuple[Index, bytes]]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        jobs = []
        for index, payload in payloads:
            with self.reader.error_context(index):
                job = self.stored.parse(payload)
            if not self.info.decoder.startswith(job.decoder):
                raise ModelMismatch(
                    f"chunk {index} of array {self.stored.path!r} has decoder {job.decoder}, but the "
                    f"model has {self.info.decoder}; write the chunk again"
                )
            jobs.append(job)
        if not jobs:
            return []
        cells = compute_cells(jobs, self.info, self.runtime)
        return [self._arranged(index, job, one) for (index, _), job, one in zip(payloads, jobs, cells, strict=True)]

    def _arranged(self, index: Index, job: PayloadToDecode, cells: Cells) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the scores and embeddings of the tiles of a chunk."""
        vocabulary = self.info.vocabulary
        size = job.header.height, job.header.width, self.geometry.tile
        pooling = self.stored.params.label_pooling
        scores = tile_labels(cells, vocabulary, *size, pooling).dense(len(vocabulary.names))
        vectors = tile_embeddings(cells, vocabulary, *size).vectors
        return self.geometry.arrange(scores, index), self.geometry.arrange(vectors, index)
