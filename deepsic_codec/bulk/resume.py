"""Which chunks of an array are stored completely, and as its codec would write them now."""

from collections.abc import Sequence

from deepsic_codec.axes import Index
from deepsic_codec.errors import DeepSICError
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.header import unpack
from deepsic_codec.payload.sections import LABELS
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.layout import PayloadLocation


def complete_chunks(stored: StoredArray, indices: Sequence[Index], *, read_all: bool = False) -> set[Index]:
    """Find the chunks whose payload is complete and as the array's codec would write it.

    A missing chunk does not count as complete: it was not written yet, or it is the fill value everywhere.

    With `read_all`, payloads are read whole and the checksums of all sections verified. Otherwise only the header is
    read and verified, and the length that it states compared with the stored length; this also detects a payload that a
    crash cut short.
    """
    reader, layout = stored.reader, stored.layout

    async def is_complete(location: PayloadLocation) -> bool:
        start = await reader.read_start(location)
        if start is None or not _is_as_configured(start.header, stored):
            return False
        if await reader.stored_length(location) != layout.stored_length(start.header.nbytes):
            return False
        if read_all:
            payload = await reader.read_payload(location)
            if payload is None:
                return False
            unpack(payload)
        return True

    damaged = (DeepSICError, FileNotFoundError)
    return {index for index, complete in reader.map(indices, is_complete, ignore=damaged) if complete}


def _is_as_configured(header: Header, stored: StoredArray) -> bool:
    """Tell whether the codec of an array writes payloads with such a header."""
    params, head = stored.params, stored.head
    head_id = bytes.fromhex(head)[:4] if head and params.semantics != "none" else bytes(4)
    return (
        header.shape == stored.chunks
        and header.axes == params.axes
        and header.order == stored.layout.order
        and params.quality in (None, header.quality)  # None: searched for each chunk
        and (header.decoder, header.head) == (bytes.fromhex(stored.decoder)[:8], head_id)
        and (header.entry(LABELS.kind) is not None) == (params.semantics == "pre")
    )
