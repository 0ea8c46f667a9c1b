"""Products of 8-bit integers: one tile of sums, in the widest instructions of the CPU.

A tile is the sums of `ROWS` rows of unsigned bytes with `BLOCK` rows of signed weights. It is written in LLVM's
instructions, because no compiler makes dot products of bytes out of a loop. Which ones depends on the CPU that numba
or a library is compiled for:

- `vnni512`, `vnni256`: four products of bytes a lane (AVX-512 VNNI, AVX-VNNI)
- `madd512`, `madd256`: two products of 16-bit integers a lane (AVX-512 BW, AVX2)
- `generic`: the same without instructions of one kind of CPU, for all others

`plain_tile` is the loop that says what they compute. DEEPSIC_KERNEL_LIBRARIES=none and NUMBA_CPU_NAME=generic make
any CPU use `generic`.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.kernels import LIBRARY, jit

#: Rows of a tile, and outputs of a row of sums.
ROWS = OUTPUTS = 4


if LIBRARY is None:
    from deepsic_codec.model.cpu import dot_tiles

    VARIANT = dot_tiles.target_variant()
else:
    VARIANT = LIBRARY.tile

_VNNI = VARIANT.startswith("vnni")
_LANES, _VECTORS = {"512": (16, 4), "256": (8, 2)}.get(VARIANT[-3:], (4, 2))
#: Outputs of a tile, and inputs of a step: inputs are padded to a multiple of it.
BLOCK, STEP = _LANES * _VECTORS, 4
#: Positions of a row of sums that are computed at a time.
POSITIONS = 2 * _LANES
#: Added to weights that are multiplied with signed rows, where instructions take unsigned bytes on one side.
WEIGHT_OFFSET = 128 if _VNNI else 0


def padded(size: int, multiple: int) -> int:
    """Return the smallest multiple that is not below a size."""
    return -(-size // multiple) * multiple


def pack(weight: NDArray[Any], signed: bool = False) -> NDArray[Any]:
    """Return a matrix int (outputs,inputs) of at most 8 bits as tiles read it, flattened, in bytes.

    Blocks of `BLOCK` outputs follow one another. Within a block, `STEP` inputs of all outputs follow one another. With
    `signed` it is for rows of signed bytes, and has `WEIGHT_OFFSET` added.
    """
    outputs, inputs = weight.shape
    whole = np.zeros((padded(outputs, BLOCK), padded(inputs, STEP)), np.int16)
    whole[:outputs, :inputs] = weight
    if signed:
        whole += WEIGHT_OFFSET
    # inputs that an instruction multiplies and adds at a time
    group = 4 if _VNNI else 2
    parts = whole.reshape(-1, BLOCK, whole.shape[1] // group, group).transpose(0, 2, 1, 3)
    kind = (np.uint8 if signed else np.int8) if _VNNI else np.int16
    return np.ascontiguousarray(parts).astype(kind).ravel().view(np.int8)


def pack_taps(weight: NDArray[Any]) -> NDArray[np.int32]:
    """Return weights int (outputs,taps,4) of at most 8 bits as `row_sums` reads them, flattened.

    Groups of `OUTPUTS` outputs follow one another. Within a group, all outputs of a tap follow one another.
    """
    outputs, taps, _ = weight.shape
    whole = np.zeros((padded(outputs, OUTPUTS), taps, 4), np.int16)
    whole[:outputs] = weight
    parts = whole.reshape(-1, OUTPUTS, taps, 4).transpose(0, 2, 1, 3)
    if _VNNI:
        return np.ascontiguousarray(parts).astype(np.int8).view(np.int32).ravel()
    # the even bytes of all outputs, then the odd ones
    pairs = parts.reshape(*parts.shape[:3], 2, 2).transpose(0, 1, 4, 2, 3)
    return np.ascontiguousarray(pairs).view(np.int32).ravel()


def pack_pairs(weight: NDArray[Any]) -> NDArray[np.int32]:
    """Return weights int (outputs,taps,2) of at most 16 bits as `row_bytes_of_pairs` reads them, flattened."""
    outputs, taps, _ = weight.shape
    parts = weight.astype(np.int16).reshape(outputs // OUTPUTS, OUTPUTS, taps, 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(parts).view(np.int32).ravel()


def plain_tile(
    rows: NDArray[Any], weights: NDArray[Any], block: int, indices: NDArray[Any], signed: bool
) -> NDArray[np.int64]:
    """Return the sums (ROWS,BLOCK) of rows (ROWS,steps STEP) with a block of packed weights (outputs,inputs).

    The rows have the steps alone that `indices` lists. With `signed`, `WEIGHT_OFFSET` times the sum of a row is
    included, as in the results of the tiles of this module.
    """
    columns = (indices[:, None] * STEP + np.arange(STEP)).ravel()
    part = weights[block * BLOCK : (block + 1) * BLOCK, columns].astype(np.int64)
    return rows.astype(np.int64) @ (part + WEIGHT_OFFSET * signed).T


#: A tile of all steps of rows of uint8, and tiles of listed steps of rows of uint8 and of int8. Their parameters are:
#: sums int32 (ROWS BLOCK,), the output; rows, of which number i starts at rows[at + pitch i]; at; pitch; the result of
#: `pack`; the number of the block; steps of all inputs; then int32 numbers of the listed steps, and how many there are.
tile: Any = None
sparse_tile: Any = None
signed_tile: Any = None
#: Sums of a layer whose inputs are four unsigned bytes of each of several words. Its parameters are: sums int32, the
#: output, where output n begins at pitch n; pitch; words int32, four bytes each; starts int32 (taps,), where the word
#: of each tap is for the first position; the result of `pack_taps`; the number of groups of `OUTPUTS` outputs; the
#: number of positions, a multiple of `POSITIONS`; initial int32 (n,POSITIONS), what is added to the sums of each output
#: at every so many positions.
row_sums: Any = None
#: The same, where sums become inputs of another layer: the output is words of four bytes, where group n begins at
#: pitch n. The last parameter is shifts int32 (n,), 0..31: bytes are sums >> shift, clipped to 0..255.
row_bytes: Any = None
#: The same as `row_bytes` of words of two signed integers of 16 bits, and of the result of `pack_pairs`.
row_bytes_of_pairs: Any = None
if LIBRARY is None:  # a library has them within its functions
    _SHAPE = dot_tiles.Shape(ROWS, _LANES, _VECTORS, STEP)
    tile = dot_tiles.vector_tile(VARIANT, _SHAPE, signed=False, sparse=False)
    sparse_tile = dot_tiles.vector_tile(VARIANT, _SHAPE, signed=False, sparse=True)
    signed_tile = dot_tiles.vector_tile(VARIANT, _SHAPE, signed=True, sparse=True)
    _ROW = VARIANT, _LANES, POSITIONS // _LANES, OUTPUTS
    row_sums = dot_tiles.row_layer(*_ROW)
    row_bytes = dot_tiles.row_layer(*_ROW, packed=True)
    row_bytes_of_pairs = dot_tiles.row_layer(*_ROW, pairs=True, packed=True)


@jit
def run_tiles(rows, signed_rows, weights, signed_weights, indices, sums):
    """Compute a tile of each kind of the first block of a matrix, from the same rows as uint8 and as int8."""
    steps = rows.size // (ROWS * STEP)
    tile(sums[0], rows, 0, steps * STEP, weights, 0, steps)
    sparse_tile(sums[1], rows, 0, steps * STEP, weights, 0, steps, indices, indices.size)
    signed_tile(sums[2], signed_rows, 0, steps * STEP, signed_weights, 0, steps, indices, indices.size)


@jit
def run_rows(words, starts, weights, pair_weights, initial, shifts, sums, packed, packed_pairs):
    """Compute the sums (outputs,positions) of a layer of several taps, and those of bytes and of pairs in bytes."""
    groups, width = packed.shape
    row_sums(sums, width, words, starts, weights, groups, width, initial)
    row_bytes(packed, width, words, starts, weights, groups, width, initial, shifts)
    row_bytes_of_pairs(packed_pairs, width, words, starts, pair_weights, groups, width, initial, shifts)


def wrong_rows(words: NDArray[np.uint8], weight: NDArray[Any], starts: NDArray[np.int32]) -> list[str]:
    """Return the kinds of rows that differ from those of NumPy.

    Parameters
    ----------
    words : uint8 (n,4)
    weight : int (outputs,taps,4)
        Of at most 8 bits. The number of outputs is a multiple of `OUTPUTS`. The first two are those of pairs.
    starts : int32 (taps,)
    """
    outputs, columns = len(weight), (len(words) - int(starts.max())) // POSITIONS * POSITIONS
    initial = np.arange(outputs * POSITIONS, dtype=np.int32).reshape(-1, POSITIONS)
    shifts = np.arange(outputs, dtype=np.int32) % 4 * 5
    sums = np.empty((outputs, columns), np.int32)
    packed, packed_pairs = np.empty((2, outputs // OUTPUTS, columns), np.int32)
    weights = pack_taps(weight), pack_pairs(weight[..., :2])
    run_rows(words.view(np.int32).ravel(), starts, *weights, initial, shifts, sums, packed, packed_pairs)

    def expected(inputs: NDArray[Any]) -> NDArray[np.int64]:
        taps = np.stack([inputs[start : start + columns] for start in starts]).astype(np.int64)
        products = np.einsum("txc,otc->ox", taps, weight[..., : inputs.shape[1]].astype(np.int64))
        return products + np.tile(initial, (1, columns // POSITIONS))

    def in_bytes(sums: NDArray[np.int64]) -> NDArray[np.int32]:
        clipped = (sums >> shifts[:, None]).clip(0, 255).astype(np.uint8)
        fours = clipped.reshape(-1, OUTPUTS, columns).transpose(0, 2, 1)
        return np.ascontiguousarray(fours).view(np.int32)[..., 0]

    of_bytes, of_pairs = expected(words), expected(words.view("<i2"))
    cases: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
        "sums": (sums, of_bytes),
        "bytes": (packed, in_bytes(of_bytes)),
        "pairs": (packed_pairs, in_bytes(of_pairs)),
    }
    return [name for name, (one, other) in cases.items() if not np.array_equal(one, other)]


def wrong_tiles(rows: NDArray[np.uint8], weight: NDArray[Any], indices: NDArray[np.int32]) -> list[str]:
    """Return the kinds of tiles that differ from `plain_tile`.

    Parameters
    ----------
    rows : uint8 (ROWS,inputs)
    weight : int (BLOCK,inputs)
        Of at most 8 bits. The number of inputs is a multiple of `STEP`.
    indices : int32 (n,)
        Steps that the tiles of listed steps take.
    """
    sums = np.empty((3, ROWS * BLOCK), np.int32)
    run_tiles(rows.ravel(), rows.view(np.int8).ravel(), pack(weight), pack(weight, signed=True), indices, sums)
    everything, left = np.arange(rows.shape[1] // STEP), rows[:, : len(indices) * STEP]
    cases = {
        "dense": (rows, everything, False),
        "sparse": (left, indices, False),
        "signed": (left.view(np.int8), indices, True),
    }
    expected = [plain_tile(part, weight, 0, steps, signed) for part, steps, signed in cases.values()]
    pairs = zip(cases, sums, expected, strict=True)
    return [name for name, one, other in pairs if not np.array_equal(one, other.ravel())]


@lru_cache(maxsize=1)
def check() -> None:
    """Compare the tiles of this CPU with `plain_tile`, once in a process.

    Raises
    ------
    ConfigurationError
        If they differ.
    """
    rng = np.random.default_rng(0)
    rows = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), (ROWS, 64))
    weight = rng.choice([-127, -88, -1, 0, 1, 127], (BLOCK, 64))
    wrong = wrong_tiles(rows, weight, np.array([0, 2, 3, 7, 15], np.int32))
    words, taps = rng.choice(rows.ravel(), (2 * POSITIONS + 8, 4)), rng.choice(weight.ravel(), (3 * OUTPUTS, 3, 4))
    if wrong := wrong + wrong_rows(words, taps, np.array([0, 7, 3], np.int32)):
        raise ConfigurationError(
            f"the instructions {VARIANT} of this CPU give other integers ({', '.join(wrong)}); "
            "set DEEPSIC_KERNEL_LIBRARIES=none and NUMBA_CPU_NAME=generic"
        )
