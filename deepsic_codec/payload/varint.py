"""Unsigned integers in as few bytes as they need: LEB128, seven bits a byte, the low ones first."""

from deepsic_codec.errors import CorruptPayload

MAX_VARINT = (1 << 32) - 1  # what every language holds in 32 bits, in at most 5 bytes


def write_varint(value: int) -> bytes:
    """Return the bytes of an integer from 0 to MAX_VARINT."""
    if not 0 <= value <= MAX_VARINT:
        raise ValueError(f"expected an integer from 0 to {MAX_VARINT}, got {value}")
    if value < 128:
        return bytes((value,))
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)


def read_varint(data: bytes, position: int, name: str) -> tuple[int, int]:
    """Read the integer at a position; return it and the position after it. `name` is that of the field, for errors.

    Raises
    ------
    CorruptPayload
        If it is larger than MAX_VARINT, or has more bytes than it needs.
    IndexError
        If `data` ends before it does.
    """
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
        if shift > 28:
            raise CorruptPayload(f"{name}: an integer has more than 5 bytes")
    if value > MAX_VARINT:
        raise CorruptPayload(f"{name}: {value}, expected at most {MAX_VARINT}")
    if shift and not byte:  # one way to write a number, so that equal chunks are equal bytes
        raise CorruptPayload(f"{name}: an integer has more bytes than it needs")
    return value, position
