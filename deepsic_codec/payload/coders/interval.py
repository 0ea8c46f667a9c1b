"""Start and end of an arithmetic-coded stream, for all coders."""

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload

# Bits of the interval [low, high]: 32 more than those of probabilities, so that an interval that straddles a byte
# boundary costs nothing measurable.
CODE_BITS = 48
CODE_MAX = (1 << CODE_BITS) - 1


def begin_encoding() -> NDArray[np.int64]:
    """Return the state of an encoder: low, high, value (unused), bytes written."""
    return np.array([0, CODE_MAX, 0, 0], np.int64)


def finish_encoding(state: NDArray[np.int64], data: NDArray[np.uint8]) -> bytes:
    """Return the stream: the fewest bytes that lie in the final interval when continued by zeros."""
    low, high, _, position = (int(v) for v in state)
    for n in range(1, CODE_BITS // 8 + 1):
        shift = CODE_BITS - 8 * n
        top = -(-low >> shift)
        if top << shift <= high:
            end = top.to_bytes(n, "big").rstrip(b"\0")
            while not end and position and not data[position - 1]:
                position -= 1
            return b"".join((data[:position].data, end))
    raise AssertionError("an interval of 48 bits always holds a number of 48 bits")


def begin_decoding(data: bytes | memoryview, section: str) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Do as `read_first`; raise CorruptPayload if the stream ends in a zero byte, which an encoder never writes."""
    state, stream = read_first(data)
    if stream.size and not stream[-1]:
        raise CorruptPayload(f"{section}: the stream ends in a zero byte")
    return state, stream


def read_first(data: bytes | memoryview) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the state of a decoder, with 6 bytes read, and the stream as an array."""
    stream = np.frombuffer(data, np.uint8).copy()
    first = int.from_bytes(stream[: CODE_BITS // 8].tobytes().ljust(CODE_BITS // 8, b"\0"), "big")
    return np.array([0, CODE_MAX, first, CODE_BITS // 8], np.int64), stream


def check_end(position: int, size: int, section: str, unit: str = "sample") -> None:
    """Raise CorruptPayload if a decoder at a position has bytes left over; `unit` is what the stream codes."""
    if position < size:
        raise CorruptPayload(f"{section}: bytes are left over after the last {unit}")
