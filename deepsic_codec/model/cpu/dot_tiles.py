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


class _Lanes:
    """Instructions of a variant on vectors of 32-bit lanes, in a function that is being built."""

    def __init__(self, variant: str, lanes: int, builder: Any) -> None:
        self.vnni, self._builder, self._count = variant.startswith("vnni"), builder, lanes
        self.vector = ir.VectorType(ir.IntType(32), lanes)
        self._words = ir.VectorType(ir.IntType(16), 2 * lanes)
        self._multiply: Any = None
        if variant != "generic":
            kind = ir.FunctionType(self.vector, [self.vector] * 3 if self.vnni else [self._words] * 2)
            self._multiply = cgutils.get_or_insert_function(builder.module, kind, INSTRUCTIONS[variant])

    def load(self, pointer: Any, kind: Any) -> Any:
        return self._builder.load(self._builder.bitcast(pointer, kind.as_pointer()), align=1)

    def everywhere(self, value: Any) -> Any:
        """Return a vector whose lanes are all a value."""
        none = ir.Constant(self.vector, ir.Undefined)
        first = self._builder.insert_element(none, value, ir.IntType(32)(0))
        return self._builder.shuffle_vector(first, none, ir.Constant(self.vector, [0] * self._count))

    def add_products(self, total: Any, data: Any, weight: Any, signed: bool = False) -> Any:
        """Add the products of a lane's bytes (VNNI) or 16-bit integers; `signed` data have unsigned weights."""
        builder = self._builder
        if self.vnni:
            return builder.call(self._multiply, [total, weight, data] if signed else [total, data, weight])
        pair = [builder.bitcast(values, self._words) for values in (data, weight)]
        if self._multiply is not None:
            return builder.add(total, builder.call(self._multiply, pair))
        wide = ir.VectorType(ir.IntType(32), 2 * self._count)
        products = builder.mul(*(builder.sext(values, wide) for values in pair))
        for parity in (0, 1):
            half_of = ir.Constant(self.vector, [2 * n + parity for n in range(self._count)])
            total = builder.add(total, builder.shuffle_vector(products, products, half_of))
        return total


def vector_tile(variant: str, shape: Shape, signed: bool, sparse: bool) -> Any:
    """Return a tile in the instructions of a variant; `dot.tile` and its like say what it takes."""
    vectors_of_row, block_size = range(shape.vectors), shape.lanes * shape.vectors

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
        to = _Lanes(variant, shape.lanes, builder)

        def data(i: int) -> Any:
            return builder.bitcast(make_array(signature.args[i])(context, builder, arguments[i]).data, i8.as_pointer())

        def moved(pointer: Any, distance: Any) -> Any:
            return builder.gep(pointer, [distance])

        at, pitch, block, steps = (arguments[i] for i in (2, 3, 5, 6))
        halves = 1 if to.vnni else 2  # of a step: four bytes, or twice two integers of 16 bits
        bytes_of_step = block_size * shape.step * halves
        weights = moved(data(4), builder.mul(builder.mul(block, steps), i64(bytes_of_step)))
        rows = [moved(data(1), builder.add(at, builder.mul(pitch, i64(i)))) for i in range(shape.rows)]
        totals = [
            [cgutils.alloca_once_value(builder, ir.Constant(to.vector, None)) for _ in vectors_of_row] for _ in rows
        ]
        indices = builder.bitcast(data(7), i32.as_pointer()) if sparse else None
        with cgutils.for_range(builder, arguments[8] if sparse else steps) as loop:
            number = builder.sext(builder.load(moved(indices, loop.index)), i64) if sparse else loop.index
            start = moved(weights, builder.mul(number, i64(bytes_of_step)))
            for half in range(halves):
                starts = [moved(start, i64((half * shape.vectors + v) * shape.lanes * 4)) for v in vectors_of_row]
                vectors = [to.load(pointer, to.vector) for pointer in starts]
                for row, sums in zip(rows, totals, strict=True):
                    values = moved(row, builder.mul(loop.index, i64(shape.step)))
                    if to.vnni:
                        value = to.everywhere(to.load(values, i32))
                    else:
                        two, widen = ir.VectorType(i8, 2), builder.sext if signed else builder.zext
                        pair = widen(to.load(moved(values, i64(2 * half)), two), ir.VectorType(i16, 2))
                        value = to.everywhere(builder.bitcast(pair, i32))
                    for vector, total in zip(vectors, sums, strict=True):
                        builder.store(to.add_products(builder.load(total), value, vector, signed), total)
        for i, row in enumerate(totals):
            for v, total in enumerate(row):
                out = moved(data(0), i64((i * block_size + v * shape.lanes) * 4))
                builder.store(builder.load(total), builder.bitcast(out, to.vector.as_pointer()), align=4)
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


def row_sums(variant: str, lanes: int, vectors: int, outputs: int) -> Any:
    """Return the sums of a layer of several taps along a row, in the instructions of a variant: see `dot.row_sums`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        to = _Lanes(variant, lanes, builder)

        def data(i: int) -> Any:
            return builder.bitcast(make_array(signature.args[i])(context, builder, arguments[i]).data, i32.as_pointer())

        sums, pitch, words, starts, taps, weights, first, width, initial, row = (
            arguments[i] if i in (1, 4, 6, 7, 9) else data(i) for i in range(10)
        )
        halves = 1 if to.vnni else 2
        group = lanes * vectors
        weights = builder.gep(weights, [first])
        byte_pairs = ir.Constant(to.vector, [0x00FF00FF] * lanes)
        eight = ir.Constant(to.vector, [8] * lanes)
        with cgutils.for_range(builder, builder.sdiv(width, i64(group))) as columns:
            column = builder.mul(columns.index, i64(group))
            totals = [[cgutils.alloca_once(builder, to.vector) for _ in range(vectors)] for _ in range(outputs)]
            for n, of_output in enumerate(totals):
                for v, total in enumerate(of_output):
                    place = builder.add(builder.mul(row, i64(group)), i64(n * group + v * lanes))
                    builder.store(to.load(builder.gep(initial, [place]), to.vector), total)
            with cgutils.for_range(builder, taps) as loop:
                at = builder.add(builder.sext(builder.load(builder.gep(starts, [loop.index])), i64), column)
                places = [builder.gep(words, [builder.add(at, i64(v * lanes))]) for v in range(vectors)]
                values = [to.load(place, to.vector) for place in places]
                tap = builder.gep(weights, [builder.mul(loop.index, i64(outputs * halves))])
                for half in range(halves):
                    parts = values
                    if not to.vnni:
                        shifted = [builder.lshr(value, eight) if half else value for value in values]
                        parts = [builder.and_(value, byte_pairs) for value in shifted]
                    for n, of_output in enumerate(totals):
                        weight = to.everywhere(builder.load(builder.gep(tap, [i64(half * outputs + n)])))
                        for part, total in zip(parts, of_output, strict=True):
                            builder.store(to.add_products(builder.load(total), part, weight), total)
            for n, of_output in enumerate(totals):
                for v, total in enumerate(of_output):
                    place = builder.add(builder.mul(pitch, i64(n)), builder.add(column, i64(v * lanes)))
                    out = builder.bitcast(builder.gep(sums, [place]), to.vector.as_pointer())
                    builder.store(builder.load(total), out, align=4)
        return context.get_dummy_value()

    @intrinsic
    def rows(  # type: ignore[no-untyped-def]
        typing_context, sums, pitch, words, starts, taps, weights, first, width, initial, row
    ):
        whole = types.intp
        return types.void(sums, whole, words, starts, whole, weights, whole, whole, initial, whole), generate

    return rows
