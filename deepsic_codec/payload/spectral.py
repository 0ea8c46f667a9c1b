"""The spectral transform section of a payload: the matrix between bands and components. See `docs/format.md`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.fields import Header

MATRIX_BITS = 14  # binary places
UNIT = 1 << MATRIX_BITS
# Largest deviation of the products of rows from those of orthonormal rows, for which a decoder's sums are exact.
MAX_DEVIATION = 1 / 256

#: int16 (components, bands), in units of 1/16384: orthonormal rows, one for each component that is stored.
Matrix = NDArray[np.int16]


def deviation(matrix: Matrix) -> float:
    """Return the largest deviation of the products of rows from those of orthonormal rows."""
    rows = matrix.astype(np.int64)
    return float(np.abs(rows @ rows.T - np.eye(len(rows), dtype=np.int64) * UNIT**2).max() / UNIT**2)


def encode_spectral(matrix: Matrix) -> bytes:
    """Write a spectral transform section."""
    return bytes((len(matrix) - 1,)) + matrix.astype("<i2").tobytes()


def decode_spectral(data: bytes, header: Header) -> Matrix:
    """Read a spectral transform section.

    Raises
    ------
    CorruptPayload
        If it has more components than the chunk has bands, another length, or rows that are not orthonormal.
    """
    bands = header.channels
    components = data[0] + 1 if data else 0
    if not 1 <= components <= bands or len(data) != 1 + 2 * components * bands:
        raise CorruptPayload(
            f"spectral transform section: {len(data)} bytes, {components} components and {bands} bands do not fit"
        )
    matrix: NDArray[Any] = np.frombuffer(data, "<i2", offset=1).reshape(components, bands)
    matrix = matrix.astype(np.int16)
    if deviation(matrix) > MAX_DEVIATION:
        raise CorruptPayload("spectral transform section: the rows are not orthonormal")
    return matrix
