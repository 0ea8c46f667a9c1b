"""The arithmetic coder: round trips, pinned bytes, hostile streams."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.coders import binary
from deepsic_codec.payload.coders import symbols as symbol_coder
from deepsic_codec.payload.coders.contexts import MIXERS, SCALES, CoderTables, ContextLayout
from deepsic_codec.payload.coders.symbols import SYMBOL_MAX, SymbolDecoder, SymbolEncoder
from tests.common import guarded

LATENTS = 8
#: Logistic scales growing from almost nothing to 100, as the real prior's table does.
TABLES = CoderTables.untrained(LATENTS, np.linspace(np.log(0.05), np.log(100), 64))
#: The same where an index is its level: whatever levels are wanted can be asked for.
LEVELS = replace(TABLES, levels=np.arange(256).clip(max=SCALES - 1).astype(np.uint8))
#: (first channel, channels, own neighbours known), positions chosen below
PASSES = ((0, 2, False), (0, 2, True), (2, 6, False), (2, 6, True))


def positions(grid, second):
    y, x = np.mgrid[: grid[0], : grid[1]]
    ys, xs = np.nonzero(((y + x) % 2 == 1) == second)
    return ys, xs


def run(coder, method, means, levels, grid):
    """Feed all passes to an encoder or decoder."""
    for start, count, second in PASSES:
        ys, xs = positions(grid, second)
        pick = lambda a, s=start, c=count, ys=ys, xs=xs: np.ascontiguousarray(a[:, ys, xs, s : s + c].reshape(-1, c))  # noqa: E731
        getattr(coder, method)(ys, xs, start, second, pick(means), pick(levels))
    return coder.finish()


def roundtrip(tables, symbols, means, levels):
    grid = symbols.shape[1:3]
    data = run(SymbolEncoder(tables, symbols), "encode_pass", means, levels, grid)
    decoder = SymbolDecoder(tables, data, symbols.shape[0], grid, LATENTS)
    np.testing.assert_array_equal(run(decoder, "decode_pass", means, levels, grid), symbols)
    return data


@st.composite
def chunks(draw):
    """Symbols with means and levels that may fit them well, badly or not at all."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 5)), LATENTS)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0, 0.3, 3, 300, SYMBOL_MAX]))
    symbols = np.clip(np.rint(rng.normal(0, 1, shape) * spread), -SYMBOL_MAX, SYMBOL_MAX).astype(np.int16)
    means = np.clip(symbols * draw(st.sampled_from([0, 8, -8])) + rng.integers(-40, 40, shape), -32767, 32767)
    levels = rng.integers(0, draw(st.sampled_from([1, 30, 100, 125])), shape).astype(np.uint8)
    return symbols, means.astype(np.int16), levels


@settings(deadline=None, max_examples=60)
@given(chunks(), st.sampled_from([0, 28, 128]), st.sampled_from([0, 1, 8]))
def test_roundtrip(chunk, single, rate):
    roundtrip(replace(LEVELS, single=single, rate=rate), *chunk)


@pytest.mark.parametrize("symbol", [SYMBOL_MAX, -SYMBOL_MAX, 1, -1, 0])
@pytest.mark.parametrize("mean", [-32767, 0, 3, 32767])
@pytest.mark.parametrize("level", [0, 124])
def test_extremes(symbol, mean, level):
    shape = (1, 2, 2, LATENTS)
    roundtrip(LEVELS, np.full(shape, symbol, np.int16), np.full(shape, mean, np.int16), np.full(shape, level, np.uint8))


@pytest.mark.parametrize("size", [0, 100, 400, 700, 1000])
def test_nothing_is_written_beyond_the_output(size):
    """Symbols of all sizes that no mean foresees, so that each needs many bytes."""
    shape = (1, 8, 9, LATENTS)
    symbols = np.random.default_rng(size).integers(-SYMBOL_MAX, SYMBOL_MAX, shape).astype(np.int16)
    means, levels = np.zeros(shape, np.int16), np.zeros(shape, np.uint8)
    encoder = SymbolEncoder(LEVELS, symbols)
    encoder._data, beyond = guarded(size)
    data = run(encoder, "encode_pass", means, levels, shape[1:3])
    assert (beyond == 165).all(), "written beyond the end of the output"
    assert data == roundtrip(LEVELS, symbols, means, levels) and len(data) > 1000


def sample(seed=7, grid=(6, 5)):
    rng = np.random.default_rng(seed)
    shape = (1, *grid, LATENTS)
    levels = rng.integers(10, 80, shape).astype(np.uint8)
    means = rng.integers(-12, 12, shape).astype(np.int16)
    symbols = np.rint(means / 8 + rng.laplace(0, 0.02 * levels)).astype(np.int16)
    return symbols, means, levels


def test_stream_is_pinned():
    """These bytes are the format: a change here breaks stored archives."""
    data = roundtrip(LEVELS, *sample())
    assert (len(data), hashlib.sha256(data).hexdigest()[:16]) == PINNED


@pytest.mark.parametrize("room", [0, 1 << 16])
@settings(deadline=None, max_examples=20)
@given(chunk=chunks(), other=st.integers(0, 1))
def test_all_passes_at_once_are_those_one_by_one(room, chunk, other):
    """Also where the output has no room for a row, and of the second of two chunks."""
    symbols, means, levels = chunk
    grid, slices = symbols.shape[1:3], symbols.shape[0]
    wanted = run(SymbolEncoder(LEVELS, symbols), "encode_pass", means, levels, grid)
    passes, places, flat, begin, first = [], [], [], 0, 0
    for start, count, second in PASSES:
        ys, xs = positions(grid, second)
        if not len(ys):
            continue
        own = [a[:, ys, xs, start : start + count].reshape(-1) for a in (means, levels)]
        pair = [(np.zeros_like(a), a) if other else (a, np.zeros_like(a)) for a in own]
        passes.append((start, count, second, first, len(ys), begin))
        places.append((ys, xs))
        flat.append([np.concatenate(both) for both in pair])
        begin, first = begin + 2 * slices * len(ys) * count, first + len(ys)
    encoder = SymbolEncoder(LEVELS, symbols)
    encoder._data = np.empty(room, np.uint8)
    joined = [np.concatenate(parts) for parts in (*zip(*places, strict=True), *zip(*flat, strict=True))]
    encoder.encode(np.array(passes, np.int64), *joined, other)
    assert encoder.finish() == wanted


def test_zeros_that_were_foreseen_cost_almost_nothing():
    shape = (1, 16, 16, LATENTS)
    tables = replace(LEVELS, probabilities=np.full(ContextLayout.of(LATENTS).size, 100, np.uint16))
    data = roundtrip(tables, np.zeros(shape, np.int16), np.zeros(shape, np.int16), np.zeros(shape, np.uint8))
    assert len(data) <= 4


def test_coder_learns_within_a_chunk():
    rng = np.random.default_rng(0)
    shape = (1, 32, 32, LATENTS)
    symbols = (rng.random(shape) < 0.02).astype(np.int16)
    data = roundtrip(LEVELS, symbols, np.zeros(shape, np.int16), np.full(shape, 40, np.uint8))
    p = symbols.mean()
    ideal = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) * symbols.size / 8
    assert len(data) < 1.25 * ideal


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=400), st.integers(0, 124))
def test_any_bytes_decode_or_are_refused(data, level):
    grid = (3, 4)
    means, levels = np.zeros((1, *grid, LATENTS), np.int16), np.full((1, *grid, LATENTS), level, np.uint8)
    try:
        symbols = run(SymbolDecoder(LEVELS, data, 1, grid, LATENTS), "decode_pass", means, levels, grid)
    except CorruptPayload:
        return
    assert np.abs(symbols.astype(int)).max() <= SYMBOL_MAX


def test_bytes_left_over_are_refused():
    symbols, means, levels = sample()
    grid = symbols.shape[1:3]
    data = run(SymbolEncoder(LEVELS, symbols), "encode_pass", means, levels, grid)
    with pytest.raises(CorruptPayload, match="left over"):
        run(SymbolDecoder(LEVELS, data + b"12345678", 1, grid, LATENTS), "decode_pass", means, levels, grid)


def test_a_zero_byte_that_is_there_reads_like_one_that_is_not():
    symbols, means, levels = sample()
    grid = symbols.shape[1:3]
    data = run(SymbolEncoder(LEVELS, symbols), "encode_pass", means, levels, grid)
    found = run(SymbolDecoder(LEVELS, data + b"\0", 1, grid, LATENTS), "decode_pass", means, levels, grid)
    np.testing.assert_array_equal(found, symbols)


def test_impossible_escape_is_refused():
    """A stream of ones asks for an Exp-Golomb prefix without end."""
    grid = (2, 2)
    means, levels = np.zeros((1, *grid, LATENTS), np.int16), np.full((1, *grid, LATENTS), 124, np.uint8)
    decoder = SymbolDecoder(LEVELS, bytes(4000), 1, grid, LATENTS)
    contexts, *rest = decoder._memory
    memory, beyond = guarded(contexts.nbytes)
    decoder._memory = memory.view(np.uint32), *rest
    decoder._memory[0][:] = contexts
    with pytest.raises(CorruptPayload, match="outside the allowed range"):
        run(decoder, "decode_pass", means, levels, grid)
    assert (beyond == 165).all(), "a context beyond the last one"


def test_a_level_is_looked_up_for_each_index():
    symbols, means, indices = sample()
    coded = [run(SymbolEncoder(LEVELS, symbols), "encode_pass", means, TABLES.levels[indices], symbols.shape[1:3])]
    coded.append(run(SymbolEncoder(TABLES, symbols), "encode_pass", means, indices, symbols.shape[1:3]))
    assert coded[0] == coded[1]


def test_output_grows_as_often_as_it_has_to():
    shape = (2, 80, 80, LATENTS)
    symbols = np.random.default_rng(3).integers(-SYMBOL_MAX, SYMBOL_MAX + 1, shape).astype(np.int16)
    data = roundtrip(LEVELS, symbols, np.zeros(shape, np.int16), np.full(shape, 40, np.uint8))
    assert len(data) > 2 * len(SymbolEncoder(LEVELS, symbols)._data)


def test_each_pass_gives_its_own_symbols():
    symbols, means, levels = sample()
    grid = symbols.shape[1:3]
    data = run(SymbolEncoder(LEVELS, symbols), "encode_pass", means, levels, grid)
    decoder = SymbolDecoder(LEVELS, data, symbols.shape[0], grid, LATENTS)
    for start, count, second in PASSES:
        at = slice(None), *positions(grid, second), slice(start, start + count)
        wanted, expected, indices = (np.ascontiguousarray(v[at].reshape(-1, count)) for v in (symbols, means, levels))
        out = np.full_like(wanted, 9)
        decoder.decode_pass(at[1], at[2], start, second, expected, indices, out)
        np.testing.assert_array_equal(out, wanted)


def test_tables_survive_the_model_file():
    again = CoderTables.from_arrays(TABLES.arrays())
    for name, value in TABLES.arrays().items():
        np.testing.assert_array_equal(getattr(again, name), value)
    assert len(TABLES.levels) == 256 and TABLES.levels.max() < SCALES and TABLES.weights.shape == (MIXERS, 4)


PINNED = (79, "6822255bf03bdc52")


def test_logistic_tables_do_not_depend_on_the_machine():
    """Tables are rounded from floating point: no entry may lie so near a tie that a last bit could turn it."""
    p = (np.arange(16384) + 0.5) / 16384
    x = (np.arange(2 * binary.STRETCH_MAX + 1) - binary.STRETCH_MAX) / binary.STRETCH_ONE
    reciprocals = 65536 / (np.arange(1024) + 1.5)
    for values in (np.log(p / (1 - p)) * binary.STRETCH_ONE, 65536 / (1 + np.exp(-x)), reciprocals):
        distance = np.abs(values - np.floor(values) - 0.5)
        assert distance.min() > 1e-7
    digest = hashlib.sha256()
    for table in (binary.STRETCH, binary.SQUASH, binary.RECIPROCAL, symbol_coder.NEIGHBOUR):
        digest.update(np.asarray(table, "<i8").tobytes())
    assert digest.hexdigest()[:16] == "7aa37f93a2ae0657"
