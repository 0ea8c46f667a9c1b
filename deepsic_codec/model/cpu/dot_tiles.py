"""Tiles of `dot` in LLVM's instructions, for numba to compile."""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np.arrayobj import make_array


def target_variant() -> str:
    """Return the name of the instructions that numba's target has, of those that `dot` lists."""
    codegen: Any = cpu_target.target_context.codegen()
    features = set(str(getattr(codegen, "_tm_features", "")).split(","))
    if "+avx512vnni" in features and "+avx512bw" in features:
        return "vnni512"
    if "+avxvnni" in features or {"+avx512vnni", "+avx512vl"} <= features:
        return "vnni256"
    if "+avx512bw" in features:
        return "madd512"
    return "madd256" if "+avx2" in features else "generic"


INSTRUCTIONS = {
    "vnni512": "llvm.x86.avx512.vpdpbusd.512",
    "vnni256": "llvm.x86.avx512.vpdpbusd.256",
    "madd512": "llvm.x86.avx512.pmaddw.d.512",
    "madd256": "llvm.x86.avx2.pmadd.wd",
}


class Shape(NamedTuple):
    """Rows of a tile, lanes of a vector, vectors of a row of sums, and inputs of a step."""

    rows: int
    lanes: int
    vectors: int
    step: int


def vector_tile(variant: str, shape: Shape, signed: bool, sparse: bool) -> Any:
    """Return a tile in the instructions of a variant; `dot.tile` and its like say what it takes."""
    vnni, vectors_of_row = variant.startswith("vnni"), range(shape.vectors)
    block_size = shape.lanes * shape.vectors

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
        lanes, none = ir.VectorType(i32, shape.lanes), ir.Constant(ir.VectorType(i32, shape.lanes), ir.Undefined)
        words = ir.VectorType(i16, 2 * shape.lanes)
        multiply: Any = None
        if variant != "generic":
            kind = ir.FunctionType(lanes, [lanes] * 3 if vnni else [words] * 2)
            multiply = cgutils.get_or_insert_function(builder.module, kind, INSTRUCTIONS[variant])

        def data(i: int) -> Any:
            return builder.bitcast(make_array(signature.args[i])(context, builder, arguments[i]).data, i8.as_pointer())

        def load(pointer: Any, kind: Any) -> Any:
            return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)

        def moved(pointer: Any, distance: Any) -> Any:
            return builder.gep(pointer, [distance])

        def everywhere(value: Any) -> Any:
            first = builder.insert_element(none, value, i32(0))
            return builder.shuffle_vector(first, none, ir.Constant(lanes, [0] * shape.lanes))

        def add_products(total: Any, row: Any, weight: Any) -> Any:
            if vnni:
                return builder.call(multiply, [total, weight, row] if signed else [total, row, weight])
            pair = [builder.bitcast(values, words) for values in (row, weight)]
            if multiply is not None:
                return builder.add(total, builder.call(multiply, pair))
            wide = ir.VectorType(i32, 2 * shape.lanes)
            products = builder.mul(*(builder.sext(values, wide) for values in pair))
            for parity in (0, 1):
                half_of = ir.Constant(lanes, [2 * n + parity for n in range(shape.lanes)])
                total = builder.add(total, builder.shuffle_vector(products, products, half_of))
            return total

        at, pitch, block, steps = (arguments[i] for i in (2, 3, 5, 6))
        halves = 1 if vnni else 2  # of a step: four bytes, or twice two integers of 16 bits
        bytes_of_step = block_size * shape.step * halves
        weights = moved(data(4), builder.mul(builder.mul(block, steps), i64(bytes_of_step)))
        rows = [moved(data(1), builder.add(at, builder.mul(pitch, i64(i)))) for i in range(shape.rows)]
        totals = [
            [cgutils.alloca_once_value(builder, ir.Constant(lanes, None)) for _ in range(shape.vectors)] for _ in rows
        ]
        indices = builder.bitcast(data(7), i32.as_pointer()) if sparse else None
        with cgutils.for_range(builder, arguments[8] if sparse else steps) as loop:
            number = builder.sext(builder.load(moved(indices, loop.index)), i64) if sparse else loop.index
            start = moved(weights, builder.mul(number, i64(bytes_of_step)))
            for half in range(halves):
                starts = [moved(start, i64((half * shape.vectors + v) * shape.lanes * 4)) for v in vectors_of_row]
                vectors = [load(pointer, lanes) for pointer in starts]
                for row, sums in zip(rows, totals, strict=True):
                    values = moved(row, builder.mul(loop.index, i64(shape.step)))
                    if vnni:
                        value = everywhere(load(values, i32))
                    else:
                        two, widen = ir.VectorType(i8, 2), builder.sext if signed else builder.zext
                        pair = widen(load(moved(values, i64(2 * half)), two), ir.VectorType(i16, 2))
                        value = everywhere(builder.bitcast(pair, i32))
                    for vector, total in zip(vectors, sums, strict=True):
                        builder.store(add_products(builder.load(total), value, vector), total)
        for i, row in enumerate(totals):
            for v, total in enumerate(row):
                out = moved(data(0), i64((i * block_size + v * shape.lanes) * 4))
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
