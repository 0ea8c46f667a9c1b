"""Which chunks of an array are stored already, whole and as they would be written now."""

import asyncio
from collections.abc import Sequence
from typing import Any

from deepsic_codec._compat import sync
from deepsic_codec.axes import Index
from deepsic_codec.bulk.layout import Layout
from deepsic_codec.errors import DeepSICError
from deepsic_codec.payload import header as payload_header
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.sections import LABELS
from deepsic_codec.stored import layout as stored

CONCURRENCY = 256  # reads in flight
BATCH = 4096  # chunks asked for at once; bounds memory


def complete_chunks(array: Any, indices: Sequence[Index], *, read_all: bool = False) -> set[Index]:
    """Find the chunks whose payload is complete and as the array's codec would write it.

    A chunk that is missing is not among them: it was not written yet, or it is the fill value everywhere.

    Parameters
    ----------
    array : zarr.Array
        Stored with DeepSIC.
    indices : sequence of tuple of int
        The chunks in question.
    read_all : bool
        Read payloads whole and verify the checksums of all sections. Otherwise only the header is read and verified,
        and the stored length compared with what it says; a payload cut short by a crash fails that too.
    """
    check = _Check(array, read_all)
    found: set[Index] = set()
    for k in range(0, len(indices), BATCH):
        batch = indices[k : k + BATCH]
        found.update(index for index, good in zip(batch, sync(check.all(batch)), strict=True) if good)
    return found


class _Check:
    def __init__(self, array: Any, read_all: bool) -> None:
        self.array, self.read_all, self.layout = array, read_all, Layout(array)
        self.config = self.layout.config
        decoder, head = self.config.identity()
        head = head if self.config.semantics != "none" else None
        self.identities = bytes.fromhex(decoder)[:8], bytes.fromhex(head or "0" * 8)[:4]

    async def all(self, indices: Sequence[Index]) -> list[bool]:
        limit = asyncio.Semaphore(CONCURRENCY)
        tables: dict[Index, asyncio.Task[Any]] = {}

        async def one(index: Index) -> bool:
            try:
                return await self.one(index, limit, tables)
            except (DeepSICError, FileNotFoundError):
                return False

        return await asyncio.gather(*map(one, indices))

    async def one(self, index: Index, limit: asyncio.Semaphore, tables: dict[Index, asyncio.Task[Any]]) -> bool:
        if self.array.shards is None:
            place: stored.Location | None = stored.Location(self.layout.key(index))
        else:
            shard = stored.shard_of(self.array, index)
            if shard not in tables:
                tables[shard] = asyncio.ensure_future(stored.read_shard_index(self.array, shard))
            table = await tables[shard]
            place = None if table is None else stored.locate_in(self.array, index, table)
        if place is None:
            return False
        async with limit:
            found = await stored.read_head(self.array, index, place)
            if found is None or not self.as_configured(found[0]):
                return False
            length = place.length
            if length is None:
                length = await self.array.store.getsize(place.key)
            if length != self.layout.stored_length(found[0].nbytes):
                return False
            if self.read_all:
                payload = await stored.read_payload(self.array, index, place)
                if payload is None:
                    return False
                payload_header.unpack(payload)
        return True

    def as_configured(self, header: Header) -> bool:
        labelled = header.entry(LABELS.kind) is not None
        return (
            header.shape == tuple(self.array.chunks)
            and header.axes == self.config.axes
            and header.order == self.layout.order
            and self.config.quality in (None, header.quality)  # None: searched for each chunk
            and (header.decoder, header.head) == self.identities
            and labelled == (self.config.semantics == "pre")
        )
