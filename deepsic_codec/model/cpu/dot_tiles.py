"""Tiles of `dot` in LLVM's instructions, for numba to compile."""

from functools import reduce
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


#: Names of instructions by lanes of 32 bits: sums of four products of bytes, and of two of 16-bit integers; a shift to
#: the right by each lane's own bits; and two vectors as one of signed 16-bit integers, and of unsigned bytes, clipped.
INSTRUCTIONS = {
    16: {
        "bytes": "avx512.vpdpbusd.512",
        "pairs": "avx512.pmaddw.d.512",
        "shift": "avx512.psrav.d.512",
        "to pairs": "avx512.packssdw.512",
        "to bytes": "avx512.packuswb.512",
    },
    8: {
        "bytes": "avx512.vpdpbusd.256",
        "pairs": "avx2.pmadd.wd",
        "shift": "avx2.psrav.d.256",
        "to pairs": "avx2.packssdw",
        "to bytes": "avx2.packuswb",
    },
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
        self._pairs, self._bytes = (ir.VectorType(ir.IntType(32 // n), n * lanes) for n in (2, 4))
        self._names = INSTRUCTIONS.get(lanes, {})

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        """Return the result of an instruction of `INSTRUCTIONS`, a vector of this type."""
        kind = ir.FunctionType(result, [one.type for one in arguments])
        name = f"llvm.x86.{self._names[name]}"
        return self._builder.call(cgutils.get_or_insert_function(self._builder.module, kind, name), arguments)

    def _constant(self, value: int) -> Any:
        return ir.Constant(self.vector, [value] * self._count)

    def load(self, pointer: Any, kind: Any) -> Any:
        return self._builder.load(self._builder.bitcast(pointer, kind.as_pointer()), align=1)

    def everywhere(self, value: Any) -> Any:
        """Return a vector whose lanes are all a value."""
        none = ir.Constant(self.vector, ir.Undefined)
        first = self._builder.insert_element(none, value, ir.IntType(32)(0))
        return self._builder.shuffle_vector(first, none, ir.Constant(self.vector, [0] * self._count))

    def store(self, vector: Any, pointer: Any) -> None:
        self._builder.store(vector, self._builder.bitcast(pointer, self.vector.as_pointer()), align=4)

    def shifted(self, vector: Any, bits: Any) -> Any:
        """Return integers divided by a power of two, rounded down; `bits` is the same in all lanes."""
        if self._names:  # LLVM would choose the shift that lanes share, which takes longer
            return self._call("shift", self.vector, vector, bits)
        return self._builder.ashr(vector, bits)

    def packed(self, vectors: Any) -> Any:
        """Return four vectors as the bytes of one, the first in the lowest, clipped to 0..255."""
        builder = self._builder
        if self._names:
            pairs = [self._call("to pairs", self._pairs, *vectors[n : n + 2]) for n in (0, 2)]
            mixed = self._call("to bytes", self._bytes, *pairs)
            # each 16 bytes are four of one vector, four of the next one, and so on
            order = [n // 16 * 16 + n % 4 * 4 + n % 16 // 4 for n in range(4 * self._count)]
            sorted_ = builder.shuffle_vector(
                mixed, mixed, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
            )
            return builder.bitcast(sorted_, self.vector)
        result, largest = self._constant(0), self._constant(255)
        for n, vector in enumerate(vectors):
            value = builder.select(builder.icmp_signed(">", vector, self._constant(0)), vector, self._constant(0))
            value = builder.select(builder.icmp_signed("<", value, largest), value, largest)
            result = builder.or_(result, builder.shl(value, self._constant(8 * n)))
        return result

    def every_other_byte(self, vector: Any, first: int) -> Any:
        """Return the bytes from the first (0) or the second (1) on as integers of 16 bits."""
        shifted = self._builder.lshr(vector, self._constant(8)) if first else vector
        return self._builder.and_(shifted, self._constant(0x00FF00FF))

    def add_products(self, total: Any, data: Any, weight: Any, signed: bool = False) -> Any:
        """Add the products of a lane's bytes (VNNI) or 16-bit integers; `signed` data have unsigned weights."""
        if self.vnni:
            return self._call("bytes", self.vector, total, *((weight, data) if signed else (data, weight)))
        return self.add_pairs(total, data, weight)

    def add_pairs(self, total: Any, data: Any, weight: Any) -> Any:
        """Add the products of a lane's 16-bit integers."""
        builder = self._builder
        factors = [builder.bitcast(values, self._pairs) for values in (data, weight)]
        if self._names:  # with VNNI, LLVM makes one instruction of both
            return builder.add(total, self._call("pairs", self.vector, *factors))
        wide = ir.VectorType(ir.IntType(32), 2 * self._count)
        products = builder.mul(*(builder.sext(values, wide) for values in factors))
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
                to.store(builder.load(total), moved(data(0), i64((i * block_size + v * shape.lanes) * 4)))
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


def row_layer(variant: str, lanes: int, vectors: int, outputs: int, pairs: bool = False, packed: bool = False) -> Any:
    """Return `dot.row_sums` in the instructions of a variant.

    With `packed` it is `dot.row_bytes`; with `pairs`, too, `dot.row_bytes_of_pairs`.
    """
    # Products take several cycles, so that more sums have to be under way than ports add to. With 32 registers these
    # are the sums of two groups of outputs, or of one group in two parts.
    at_once = 2 if lanes == 16 else 1
    groups_at_once, parts = (at_once, 1) if packed else (1, at_once)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        to = _Lanes(variant, lanes, builder)
        values, sizes = [], []
        for kind, value in zip(signature.args, arguments, strict=True):
            array = make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else None
            values.append(value if array is None else builder.bitcast(array.data, i32.as_pointer()))
            sizes.append(None if array is None else cgutils.unpack_tuple(builder, array.shape)[0])
        out, pitch, words, starts, weights, groups, width, initial, *shifts = values
        taps = sizes[3]
        halves = 1 if to.vnni or pairs else 2

        def moved(pointer: Any, distance: Any, factor: Any = 1) -> Any:
            distance, factor = (i64(value) if isinstance(value, int) else value for value in (distance, factor))
            return builder.gep(pointer, [builder.mul(distance, factor)])

        def load_words(pointer: Any) -> list[Any]:
            return [to.load(moved(pointer, v * lanes), to.vector) for v in range(vectors)]

        def add_tap(tap: Any, column: Any, of_groups: list[Any], totals: list[list[Any]]) -> None:
            """Add the products of a tap to sums (outputs,vectors); weights of groups start at `of_groups`."""
            start = builder.sext(builder.load(moved(starts, tap)), i64)
            data = load_words(moved(moved(words, start), column))
            of_tap = [moved(pointer, tap, outputs * halves) for pointer in of_groups]
            for half in range(halves):
                factors = [to.every_other_byte(vector, half) for vector in data] if halves == 2 else data
                for n, of_output in enumerate(totals):
                    place = moved(of_tap[n // outputs], half * outputs + n % outputs)
                    weight = to.everywhere(builder.load(place))
                    for factor, total in zip(factors, of_output, strict=True):
                        add = to.add_pairs if pairs else to.add_products
                        builder.store(add(builder.load(total), factor, weight), total)

        def sums(column: Any, group: Any, count: int) -> list[list[Any]]:
            """Return the sums (outputs,vectors) of so many groups."""
            start = moved(initial, builder.mul(group, i64(outputs)), lanes * vectors)
            of_parts = [
                [[cgutils.alloca_once(builder, to.vector) for _ in range(vectors)] for _ in range(count * outputs)]
                for _ in range(parts)
            ]
            for part, totals in enumerate(of_parts):
                for n, of_output in enumerate(totals):
                    values = load_words(moved(start, n * lanes * vectors))
                    for value, total in zip(values, of_output, strict=True):
                        builder.store(ir.Constant(to.vector, None) if part else value, total)
            of_group = builder.mul(taps, i64(outputs * halves))
            of_groups = [moved(weights, builder.add(group, i64(n)), of_group) for n in range(count)]
            with cgutils.for_range(builder, builder.sdiv(taps, i64(parts))) as loop:
                for part, totals in enumerate(of_parts):
                    tap = builder.add(builder.mul(loop.index, i64(parts)), i64(part))
                    add_tap(tap, column, of_groups, totals)
            if parts == 2:
                with builder.if_then(builder.trunc(taps, ir.IntType(1))):
                    add_tap(builder.sub(taps, i64(1)), column, of_groups, of_parts[0])
            return [
                [reduce(builder.add, map(builder.load, one)) for one in zip(*of_output, strict=True)]
                for of_output in zip(*of_parts, strict=True)
            ]

        def write(column: Any, group: Any, count: int) -> None:
            """Write the sums of so many groups."""
            rows = sums(column, group, count)
            line = group
            if packed:
                for n, totals in enumerate(rows):
                    bits = builder.load(moved(moved(shifts[0], group, outputs), n))
                    rows[n] = [to.shifted(total, to.everywhere(bits)) for total in totals]
                fours = [zip(*rows[first : first + 4], strict=True) for first in range(0, len(rows), 4)]
                rows = [[to.packed(four) for four in of_group] for of_group in fours]
            else:
                line = builder.mul(group, i64(outputs))
            for n, row in enumerate(rows):
                place = moved(moved(out, builder.add(line, i64(n)), pitch), column)
                for v, vector in enumerate(row):
                    to.store(vector, moved(place, v * lanes))

        positions = i64(lanes * vectors)
        with cgutils.for_range(builder, builder.sdiv(width, positions)) as columns:
            column = builder.mul(columns.index, positions)
            with cgutils.for_range(builder, builder.sdiv(groups, i64(groups_at_once))) as loop:
                write(column, builder.mul(loop.index, i64(groups_at_once)), groups_at_once)
            if groups_at_once == 2:
                with builder.if_then(builder.trunc(groups, ir.IntType(1))):
                    write(column, builder.sub(groups, i64(1)), 1)
        return context.get_dummy_value()

    whole = types.intp

    @intrinsic
    def sums_of_row(  # type: ignore[no-untyped-def]
        typing_context, out, pitch, words, starts, weights, groups, width, initial
    ):
        return types.void(out, whole, words, starts, weights, whole, whole, initial), generate

    @intrinsic
    def bytes_of_row(  # type: ignore[no-untyped-def]
        typing_context, out, pitch, words, starts, weights, groups, width, initial, shifts
    ):
        return types.void(out, whole, words, starts, weights, whole, whole, initial, shifts), generate

    return bytes_of_row if packed else sums_of_row
