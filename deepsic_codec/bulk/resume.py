"""Which chunks of an array are stored completely, as its codec would write them now, and by which run."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from deepsic_codec._compat import default_buffer_prototype, sync
from deepsic_codec.axes import Index, Region
from deepsic_codec.errors import DeepSICError
from deepsic_codec.payload.cast import CAST_DTYPES
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.header import unpack
from deepsic_codec.payload.sections import CAST, LABELS
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.layout import PayloadLocation
from deepsic_codec.stored.reader import PayloadStart

FOLDER = "deepsic-journal"  # among the keys of an array
RECORD = np.dtype([("chunk", "<u8"), ("crc", "<u4")])  # position in the flattened grid, checksum of the header
READS = 256  # entries read at a time


@dataclass(frozen=True)
class Journal:
    """The record of which payloads were made from a source, so that another run can continue an interrupted one.

    A batch of payloads is recorded while it is stored, under a key of its own, by chunk and checksum. A chunk was
    written from this source if its checksum is in a record: the checksum covers those of all sections.

    Attributes
    ----------
    folder : str
        Prefix of the keys of all runs that write a region.
    run : str
        Beginning of the names of those from this source, with these parameters.
    """

    folder: str
    run: str

    @classmethod
    def of(cls, stored: StoredArray, source: str, region: Region) -> "Journal | None":
        """Return the journal for writing a source, identified by its name, to a region; None where there is none."""
        if not stored.array.store.supports_deletes:
            return None  # a later run could not remove what became wrong
        bounds = [[part.start, part.stop] for part in region]
        about = [source, bounds, list(stored.shape), stored.params.to_json()]
        folder = f"{FOLDER}/{_digest(bounds)}"
        return cls(f"{stored.path}/{folder}" if stored.path else folder, _digest(about))

    def begin(self, stored: StoredArray) -> None:
        """Remove all records, before a region is written anew."""
        sync(stored.array.store.delete_dir(self.folder))

    def record(self, grid: Index, payloads: Mapping[Index, bytes]) -> tuple[str, bytes]:
        """Return key and value of a record of payloads."""
        records = np.empty(len(payloads), RECORD)
        for number, (index, payload) in enumerate(payloads.items()):
            records[number] = np.ravel_multi_index(index, grid), PayloadStart.of(payload).crc
        return self._key(), records.tobytes()

    def _key(self) -> str:
        return f"{self.folder}/{self.run}-{uuid4().hex}.bin"

    def read(self, stored: StoredArray) -> tuple[NDArray[Any], bool]:
        """Return all records of this run, of `RECORD`, and whether there are records of others.

        A store that lists nothing but Zarr's own keys, as Icechunk does, has none.
        """
        store, limit = stored.array.store, asyncio.Semaphore(READS)

        async def get(key: str) -> bytes:
            async with limit:
                data = await store.get(key, default_buffer_prototype())
            return b"" if data is None else data.to_bytes()

        async def get_all() -> tuple[list[bytes], bool]:
            try:
                keys = [key async for key in store.list_prefix(f"{self.folder}/")]
            except Exception as error:  # each store has errors of its own
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    raise
                keys = []
            mine = [key for key in keys if key.startswith(f"{self.folder}/{self.run}-")]
            return await asyncio.gather(*map(get, mine)), len(mine) < len(keys)

        values, others = sync(get_all())
        # A value that a crash cut short has whole records before the cut.
        whole = b"".join(value[: len(value) // RECORD.itemsize * RECORD.itemsize] for value in values)
        return np.frombuffer(whole, RECORD), others

    def finish(self, stored: StoredArray, records: NDArray[Any]) -> None:
        """Put the records of a run that is complete into one value; what fails leaves them as they are."""
        store = stored.array.store

        async def join() -> None:
            keys = [key async for key in store.list_prefix(f"{self.folder}/")]
            if len(keys) > 1:
                await store.set(self._key(), default_buffer_prototype().buffer.from_bytes(records.tobytes()))
                await asyncio.gather(*map(store.delete, keys))

        with suppress(Exception):
            sync(join())


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def complete_chunks(
    stored: StoredArray, indices: Sequence[Index], *, written: NDArray[Any] | None = None, read_all: bool = False
) -> set[Index]:
    """Find the chunks whose payload is complete and as the array's codec would write it.

    With `written`, records of a journal, only chunks whose checksum is among them count.

    A missing chunk does not count as complete: it was not written yet, or it is the fill value everywhere.

    With `read_all`, payloads are read whole and the checksums of all sections verified. Otherwise only the header is
    read and verified, and the length that it states compared with the stored length; this also detects a payload that a
    crash cut short.
    """
    reader, layout = stored.reader, stored.layout
    recorded: set[tuple[int, int]] | None = None
    if written is not None:
        recorded = set(written.tolist())
        chunks = {chunk for chunk, _ in recorded}
        indices = [index for index in indices if np.ravel_multi_index(index, stored.grid) in chunks]

    async def checksum(location: PayloadLocation) -> int | None:
        """Return the checksum of a complete payload."""
        start = await reader.read_start(location)
        if start is None or not _is_as_configured(start.header, stored):
            return None
        if await reader.stored_length(location) != layout.stored_length(start.header.nbytes):
            return None
        if read_all:
            payload = await reader.read_payload(location)
            if payload is None:
                return None
            unpack(payload)
        return start.crc

    damaged = (DeepSICError, FileNotFoundError)
    return {
        index
        for index, crc in reader.map(indices, checksum, ignore=damaged)
        if crc is not None and (recorded is None or (np.ravel_multi_index(index, stored.grid), crc) in recorded)
    }


def _is_as_configured(header: Header, stored: StoredArray) -> bool:
    """Tell whether the codec of an array writes payloads with such a header."""
    params, head, dtype = stored.params, stored.head, stored.array.dtype.newbyteorder("=")
    head_id = bytes.fromhex(head)[:4] if head and params.semantics != "none" else bytes(4)
    return (
        header.shape == stored.chunks
        and (header.entry(CAST.kind) is not None or header.dtype.newbyteorder("=") == dtype)
        and (header.entry(CAST.kind) is not None) == (dtype in CAST_DTYPES)
        and header.axes == params.axes
        and header.order == stored.layout.order
        and params.quality in (None, header.quality)  # None: searched for each chunk
        and (header.decoder, header.head) == (bytes.fromhex(stored.decoder)[:8], head_id)
        and (header.entry(LABELS.kind) is not None) == (params.semantics == "pre")
    )
