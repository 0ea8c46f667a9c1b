"""Beginning and end of an arithmetic-coded stream: what the coders of a payload's sections share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload

#: The interval [low, high] has 48 bits: at 32 bits of slack over the 16-bit probabilities,
#: an interval that straddles a byte boundary costs nothing measurable.
CODE_BITS = 48
CODE_MAX = (1 << CODE_BITS) - 1


def begin_encoding() -> NDArray[np.int64]:
    """State of an encoder: low, high, value (unused), bytes put out."""
    return np.array([0, CODE_MAX, 0, 0], np.int64)


def finish_encoding(state: NDArray[np.int64], data: NDArray[np.uint8]) -> bytes:
    """The stream: the fewest bytes that lie in the final interval when continued by zeros."""
    low, high, _, position = (int(v) for v in state)
    out = data[:position].tobytes()
    for n in range(1, CODE_BITS // 8 + 1):
        shift = CODE_BITS - 8 * n
        top = -(-low >> shift)
        if top << shift <= high:
            return (out + top.to_bytes(n, "big")).rstrip(b"\0")
    raise AssertionError("an interval of 48 bits always holds a number of 48 bits")


def begin_decoding(data: bytes, section: str) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """State of a decoder, with 6 bytes read, and the stream as an array; for sections that end in one way only.

    Raises
    ------
    CorruptPayload
        If the stream ends in a zero byte, which an encoder never writes.
    """
    state, stream = read_first(data)
    if stream.size and not stream[-1]:
        raise CorruptPayload(f"{section}: the stream ends in a zero byte")
    return state, stream


def read_first(data: bytes) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """State of a decoder, with 6 bytes read, and the stream as an array, whatever it ends in."""
    stream = np.frombuffer(data, np.uint8).copy()
    first = int.from_bytes(stream[: CODE_BITS // 8].tobytes().ljust(CODE_BITS // 8, b"\0"), "big")
    return np.array([0, CODE_MAX, first, CODE_BITS // 8], np.int64), stream


def finish_decoding(state: NDArray[np.int64], data: NDArray[np.uint8], section: str, last: str = "sample") -> None:
    """Check that the stream was read to its end; ``last`` is what it ends with.

    Raises
    ------
    CorruptPayload
        If bytes were left over.
    """
    check_end(int(state[3]), data.size, section, last)


def check_end(position: int, size: int, section: str, last: str = "sample") -> None:
    """The same of a stream of ``size`` bytes that was read up to ``position``."""
    if position < size:
        raise CorruptPayload(f"{section}: bytes left over after the last {last}")
