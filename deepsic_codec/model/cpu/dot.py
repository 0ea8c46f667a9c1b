"""Products of 8-bit integers: one tile of sums, in the widest instructions of the CPU.

A tile is the sums of `ROWS` rows of unsigned bytes with `BLOCK` rows of signed weights. It is written in LLVM's
instructions, because no compiler makes dot products of bytes out of a loop. Which ones depends on the CPU that numba
compiles for, which is a part of the key under which it keeps compiled code:

- `vnni512`, `vnni256`: four products of bytes a lane (AVX-512 VNNI, AVX-VNNI)
- `madd512`, `madd256`: two products of 16-bit integers a lane (AVX-512 BW, AVX2)
- `generic`: the same without instructions of one kind of CPU, for all others

`plain_tile` is the loop that says what they compute. NUMBA_CPU_NAME=generic makes a CPU use `generic`.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.payload.coders.numba_jit import jit

#: Rows of a tile.
ROWS = 4


def _variant() -> str:
    """Return the name of the instructions that numba's target has."""
    codegen: Any = cpu_target.target_context.codegen()
    features = set(str(getattr(codegen, "_tm_features", "")).split(","))
    if "+avx512vnni" in features and "+avx512bw" in features:
        return "vnni512"
    if "+avxvnni" in features or {"+avx512vnni", "+avx512vl"} <= features:
        return "vnni256"
    if "+avx512bw" in features:
        return "madd512"
    return "madd256" if "+avx2" in features else "generic"


VARIANT = _variant()
_INSTRUCTIONS = {
    "vnni512": "llvm.x86.avx512.vpdpbusd.512",
    "vnni256": "llvm.x86.avx512.vpdpbusd.256",
    "madd512": "llvm.x86.avx512.pmaddw.d.512",
    "madd256": "llvm.x86.avx2.pmadd.wd",
}
_VNNI = VARIANT.startswith("vnni")
_LANES, _VECTORS = {"512": (16, 4), "256": (8, 2)}.get(VARIANT[-3:], (4, 2))
#: Outputs of a tile, and inputs of a step: inputs are padded to a multiple of it.
BLOCK, STEP = _LANES * _VECTORS, 4
#: Added to weights that are multiplied with signed rows, where instructions take unsigned bytes on one side.
WEIGHT_OFFSET = 128 if _VNNI else 0


def padded(size: int, multiple: int) -> int:
    """Return the smallest multiple that is not below a size."""
    return -(-size // multiple) * multiple


def pack(weight: NDArray[Any], signed: bool = False) -> NDArray[Any]:
    """Return a matrix int (outputs,inputs) of at most 8 bits as tiles read it, flattened.

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
    return np.ascontiguousarray(parts).astype(kind).ravel()


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


def _vector_tile(signed: bool, sparse: bool) -> Any:
    """Return a tile in vector instructions."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
        lanes, none = ir.VectorType(i32, _LANES), ir.Constant(ir.VectorType(i32, _LANES), ir.Undefined)
        words = ir.VectorType(i16, 2 * _LANES)
        multiply: Any = None
        if VARIANT != "generic":
            kind = ir.FunctionType(lanes, [lanes] * 3 if _VNNI else [words] * 2)
            multiply = cgutils.get_or_insert_function(builder.module, kind, _INSTRUCTIONS[VARIANT])

        def data(i: int) -> Any:
            return builder.bitcast(make_array(signature.args[i])(context, builder, arguments[i]).data, i8.as_pointer())

        def load(pointer: Any, kind: Any) -> Any:
            return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)

        def moved(pointer: Any, distance: Any) -> Any:
            return builder.gep(pointer, [distance])

        def everywhere(value: Any) -> Any:
            first = builder.insert_element(none, value, i32(0))
            return builder.shuffle_vector(first, none, ir.Constant(lanes, [0] * _LANES))

        def add_products(total: Any, row: Any, weight: Any) -> Any:
            if _VNNI:
                return builder.call(multiply, [total, weight, row] if signed else [total, row, weight])
            pair = [builder.bitcast(values, words) for values in (row, weight)]
            if multiply is not None:
                return builder.add(total, builder.call(multiply, pair))
            wide = ir.VectorType(i32, 2 * _LANES)
            products = builder.mul(*(builder.sext(values, wide) for values in pair))
            for parity in (0, 1):
                half_of = ir.Constant(lanes, [2 * n + parity for n in range(_LANES)])
                total = builder.add(total, builder.shuffle_vector(products, products, half_of))
            return total

        at, pitch, block, steps = (arguments[i] for i in (2, 3, 5, 6))
        halves = 1 if _VNNI else 2  # of a step: four bytes, or twice two integers of 16 bits
        bytes_of_step = BLOCK * STEP * halves
        weights = moved(data(4), builder.mul(builder.mul(block, steps), i64(bytes_of_step)))
        rows = [moved(data(1), builder.add(at, builder.mul(pitch, i64(i)))) for i in range(ROWS)]
        totals = [[cgutils.alloca_once_value(builder, ir.Constant(lanes, None)) for _ in range(_VECTORS)] for _ in rows]
        indices = builder.bitcast(data(7), i32.as_pointer()) if sparse else None
        with cgutils.for_range(builder, arguments[8] if sparse else steps) as loop:
            number = builder.sext(builder.load(moved(indices, loop.index)), i64) if sparse else loop.index
            start = moved(weights, builder.mul(number, i64(bytes_of_step)))
            for half in range(halves):
                vectors = [load(moved(start, i64((half * _VECTORS + v) * _LANES * 4)), lanes) for v in range(_VECTORS)]
                for row, sums in zip(rows, totals, strict=True):
                    values = moved(row, builder.mul(loop.index, i64(STEP)))
                    if _VNNI:
                        value = everywhere(load(values, i32))
                    else:
                        two, widen = ir.VectorType(i8, 2), builder.sext if signed else builder.zext
                        pair = widen(load(moved(values, i64(2 * half)), two), ir.VectorType(i16, 2))
                        value = everywhere(builder.bitcast(pair, i32))
                    for vector, total in zip(vectors, sums, strict=True):
                        builder.store(add_products(builder.load(total), value, vector), total)
        for i, row in enumerate(totals):
            for v, total in enumerate(row):
                out = moved(data(0), i64((i * BLOCK + v * _LANES) * 4))
                builder.store(builder.load(total), builder.bitcast(out, lanes.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def dense(typing_context, sums, rows, at, pitch, weights, block, steps):  # type: ignore[no-untyped-def]
        whole = types.intp
        return types.void(sums, rows, whole, whole, weights, whole, whole), generate

    @intrinsic
    def listed(  # type: ignore[no-untyped-def]
        typing_context, sums, rows, at, pitch, weights, block, steps, indices, count
    ):
        whole = types.intp
        return types.void(sums, rows, whole, whole, weights, whole, whole, indices, whole), generate

    return listed if sparse else dense


#: A tile of all steps of rows of uint8, and tiles of listed steps of rows of uint8 and of int8. Their parameters are:
#: sums int32 (ROWS BLOCK,), the output; rows, of which number i starts at rows[at + pitch i]; at; pitch; the result of
#: `pack`; the number of the block; steps of all inputs; then int32 numbers of the listed steps, and how many there are.
tile: Any = _vector_tile(False, False)
sparse_tile: Any = _vector_tile(False, True)
signed_tile: Any = _vector_tile(True, True)


@jit
def run_tiles(rows, signed_rows, weights, signed_weights, indices, sums):
    """Compute a tile of each kind of the first block of a matrix, from the same rows as uint8 and as int8."""
    steps = rows.size // (ROWS * STEP)
    tile(sums[0], rows, 0, steps * STEP, weights, 0, steps)
    sparse_tile(sums[1], rows, 0, steps * STEP, weights, 0, steps, indices, indices.size)
    signed_tile(sums[2], signed_rows, 0, steps * STEP, signed_weights, 0, steps, indices, indices.size)


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
    if wrong := wrong_tiles(rows, weight, np.array([0, 2, 3, 7, 15], np.int32)):
        raise ConfigurationError(
            f"the instructions {VARIANT} of this CPU give other integers ({', '.join(wrong)}); "
            "set NUMBA_CPU_NAME=generic"
        )
