"""The structure section: levels of samples are numbered and come back, and what is wrong is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import reference
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload import header as h
from deepsic_codec.payload.sections import STRUCTURE
from deepsic_codec.payload.structure import (
    RESIDUAL,
    WAVELET,
    Grid,
    Levels,
    Structure,
    decode_structure,
    encode_structure,
    grids_length,
    table_length,
    verified_grids,
)
from deepsic_codec.payload.wavelet import Wavelet, encode_wavelet
from tests.common import check_rejects
from tests.payload import crafted

CODES = {"u1": 1, "i1": 2, "u2": 3, "i2": 4, "f4": 5}


def header(dtype, bands):
    return h.read_header(crafted.write(dtype=CODES[dtype], shape=(20, 30, bands), grid=(2, 2), sections=[]))


def read_by_reference(data, dtype, bands):
    return reference.read_structure(data, reference.Chunk((1, 20, 30, bands), np.dtype(dtype), None))


@st.composite
def structures(draw):
    dtype = draw(st.sampled_from(["u1", "i1", "u2", "i2"]))
    info = np.iinfo(dtype)
    bands = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["same", "lattice", "few", "dense"]))
        if kind == "same" and bands:
            bands.append(bands[-1])
        elif kind == "lattice":
            divisor = draw(st.sampled_from([1, 2, 3, 16, 255, 256, 65535]))
            bands.append(Levels(divisor, draw(st.integers(0, min(divisor - 1, info.max)))))
        else:
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            values = np.arange(info.min, info.max + 1)
            count = draw(st.integers(1, 100)) if kind == "few" else len(values) * 3 // 5
            bands.append(Levels(table=np.sort(rng.permutation(values)[:count]).astype(np.int64)))
    return dtype, Structure(tuple(bands), draw(st.binary(max_size=3)))


@given(structures())
def test_what_was_written_is_read(case):
    dtype, structure = case
    data = encode_structure(structure)
    decoded = decode_structure(data, header(dtype, len(structure.levels)))
    assert encode_structure(decoded) == data
    assert decoded.padding == structure.padding
    read = read_by_reference(encode_structure(Structure(structure.levels)), dtype, len(structure.levels)).levels
    for levels, expected in zip(decoded.levels, read, strict=True):
        numbers, values = expected.first + np.arange(len(expected.values)), expected.values.astype(dtype)
        np.testing.assert_array_equal(levels.samples(numbers.astype(np.int32), values.dtype), values)
        np.testing.assert_array_equal(levels.numbers(values), numbers)


@given(structures(), st.integers(0, 99))
def test_samples_become_the_nearest_levels(case, seed):
    dtype, structure = case
    info = np.iinfo(dtype)
    size = len(structure.levels)
    samples = np.random.default_rng(seed).integers(info.min, info.max + 1, (1, 3, 5, size)).astype(dtype)
    samples[0, 0, 0], samples[0, 0, 1] = info.min, info.max
    expected = read_by_reference(encode_structure(Structure(structure.levels)), dtype, size).levels
    nearest = structure.nearest(samples)
    assert nearest.dtype == samples.dtype
    for band in range(size):
        levels, wide = expected[band].values, samples[..., band].astype(np.int64)
        np.testing.assert_array_equal(nearest[..., band], levels[np.abs(levels - wide[..., None]).argmin(axis=-1)])
        np.testing.assert_array_equal(nearest[..., band], expected[band].nearest(wide))


def test_few_bytes_describe_levels():
    regular = Levels(table=np.arange(0, 65536, 500))
    assert len(encode_structure(Structure((regular,) * 4))) < 280
    dense = Levels(table=np.flatnonzero(np.arange(256) % 5))
    assert len(encode_structure(Structure((dense,)))) < 40
    assert len(encode_structure(Structure((Levels(16, 3),) * 4))) == 6


@pytest.mark.parametrize("levels", [Levels(16, 3), Levels(table=np.array([5, 7, 90]))])
@pytest.mark.parametrize("number", [-1, 4096, 2**31 - 1])
def test_numbers_without_a_level_are_refused(levels, number):
    numbers = np.full((1, 2, 2, 1), number, np.int32)
    words = "structure section|no level"
    check_rejects(CorruptPayload, words, Structure((levels,)).samples, numbers, np.dtype("u2"))


def table(fields, pieces=b""):
    """A section with grids, the checksum of which is right."""
    return fields + reference.crc32c(fields).to_bytes(4, "little") + pieces


def sampled(*lengths, content=b""):
    """A grid with a residual, up to its checksum, as `table` takes it."""
    return b"\4\0\2\0\0\1\x08" + bytes(lengths) + reference.crc32c(content).to_bytes(4, "little")


SOUND = b"\1\1\0\7\2\1\1"  # levels 7, 9, 11
WRONG = {
    "empty": (b"", CorruptPayload, "empty"),
    "layout 0": (b"\0\2", UnsupportedPayload, "layout 0x00|upgrade"),
    "layout 8": (b"\x08\2", UnsupportedPayload, "layout 0x08|upgrade"),
    "grids without bands": (b"\4", CorruptPayload, "truncated"),
    "a grid without fields": (b"\4\0\2\0\0", CorruptPayload, "truncated"),
    "an empty grid": (b"\4\1\2\0\0\0\2\0\0\0", CorruptPayload, "grid 0 has 0 bands"),
    "255 empty grids": (b"\4\xff" + b"\2\0\0\0" * 256, CorruptPayload, "grid 0 has 0 bands"),
    "factor 0": (b"\4\0\0\0\0\0", CorruptPayload, "factor 0"),
    "factor 17": (b"\4\0\x11\0\0\0", CorruptPayload, "factor 17"),
    "phase of rows": (b"\4\0\2\2\0\0", CorruptPayload, "phase 2, 0"),
    "phase of columns": (b"\4\0\2\0\2\0", CorruptPayload, "phase 0, 2"),
    "a section cut off": (b"\4\0\2\0\0\1\7\3ab", CorruptPayload, "truncated"),
    "a long section": (b"\4\0\2\0\0\1\7\xff\xff\xff\xff\x0fab", CorruptPayload, "truncated"),
    "a section twice": (b"\4\0\2\0\0\2\7\0\7\0", CorruptPayload, "kind 7 twice"),
    "no checksum": (b"\4\0\2\0\0\0", CorruptPayload, "truncated"),
    "another checksum": (table(b"\4\0\2\0\0\0")[:-1] + b"\0", CorruptPayload, "checksum of the grids"),
    "bytes after the grids": (table(b"\4\0\2\0\0\0", b"\0"), CorruptPayload, "11 bytes with grids of 10"),
    "four lengths": (table(sampled(1, 0, 0, 0)), CorruptPayload, ""),
    "a piece cut off": (table(sampled(2, 0, 0, 1, 0, content=b"abc"), b"ab"), CorruptPayload, "bytes with grids of"),
    "bytes after the pieces": (table(sampled(1, 0, 0, 1, 0, content=b"ab"), b"abc"), CorruptPayload, "with grids of"),
    "other samples": (table(sampled(1, 0, 0, 1, 0, content=b"ab"), b"aB"), CorruptPayload, "checksum of a section"),
    "long pieces": (table(sampled(*b"\xff\xff\xff\xff\x0f" * 5)), CorruptPayload, "with grids of"),
    "layout 5": (b"\5\2", UnsupportedPayload, "layout 0x05|upgrade"),
    "no padding": (b"\2", CorruptPayload, "0 bytes after the levels"),
    "no padding after levels": (b"\3\2", CorruptPayload, "0 bytes after the levels"),
    "no bands": (b"\1", CorruptPayload, "truncated"),
    "as the band before": (b"\1\0", CorruptPayload, "first band"),
    "no offset": (b"\1\5", CorruptPayload, "truncated"),
    "offset 4 of divisor 4": (b"\1\5\4", CorruptPayload, "divisor 4 and offset 4"),
    "no level of the dtype": (b"\1\xff\xff\3\x80\2", CorruptPayload, "divisor 65534 and offset 256"),
    "divisor 65536": (b"\1\x81\x80\x04\0", CorruptPayload, "divisor 65536"),
    "a long varint": (b"\1\x82\0", CorruptPayload, "more bytes than it needs"),
    "form 2": (b"\1\1\2\7\0", UnsupportedPayload, "form 2|upgrade"),
    "no form": (b"\1\1", CorruptPayload, "truncated"),
    "no gaps": (b"\1\1\0\7\2\1", CorruptPayload, "truncated"),
    "length 65536": (b"\1\1\0\7\x80\x80\4" + bytes(65536), CorruptPayload, "size 65536"),
    "length 2**32 - 1": (b"\1\1\1\7\xff\xff\xff\xff\x0f", CorruptPayload, "size 4294967295"),
    "entry 256": (b"\1\1\0\xff\1\1\0", CorruptPayload, "levels from 255 to 256"),
    "entry 2**40": (b"\1\1\0\0\2" + b"\xff\xff\xff\xff\x0f" * 2, CorruptPayload, "levels from 0"),
    "first entry 256": (b"\1\1\0\x80\2\0", CorruptPayload, "levels from 256"),
    "no bitmap": (b"\1\1\1\7\x09\0", CorruptPayload, "truncated"),
    "bits after the last": (b"\1\1\1\7\4\x10", CorruptPayload, "bits after its last"),
    "a byte long": (SOUND + b"\0", CorruptPayload, "1 bytes after the levels"),
}


@pytest.mark.parametrize("name", WRONG)
def test_crafted_sections(name):
    data, error, words = WRONG[name]
    assert decode_structure(SOUND, header("u1", 1)).levels[0].table.tolist() == [7, 9, 11]
    payload = crafted.write(shape=(20, 30, 1), grid=(2, 2), sections=[(4, data)])
    check_rejects(error, f"structure section|{words}", h.unpack(payload).read, STRUCTURE)
    crafted.check_reference_rejects(error, payload)


def test_padding_alone():
    data = encode_structure(Structure(None, b"123"))
    decoded = decode_structure(data, header("f4", 3))
    assert data == b"\x02123" and decoded.levels is None and decoded.padding == b"123"


def test_levels_of_floats_are_refused():
    check_rejects(CorruptPayload, "structure section|float32", decode_structure, SOUND, header("f4", 1))


@given(st.binary(max_size=40), st.sampled_from(["u1", "i1", "u2", "i2"]), st.integers(1, 3))
def test_any_bytes_are_levels_or_are_refused(data, dtype, bands):
    try:
        structure = decode_structure(b"\1" + data, header(dtype, bands))
    except (CorruptPayload, UnsupportedPayload):
        return
    samples = np.arange(2 * bands, dtype=dtype).reshape(1, 1, 2, bands)
    nearest = structure.nearest(samples)
    np.testing.assert_array_equal(structure.nearest(nearest), nearest)


@st.composite
def grids(draw):
    count = draw(st.integers(1, 6))
    numbers = draw(st.permutations([i * draw(st.integers(1, count)) // count for i in range(count)]))
    numbers = np.unique(numbers, return_inverse=True)[1]
    out = []
    for number in range(numbers.max() + 1):
        factor = draw(st.integers(1, 16))
        phase = draw(st.integers(0, factor - 1)), draw(st.integers(0, factor - 1))
        sections = {kind: draw(st.binary(max_size=200)) for kind in draw(st.permutations([5, 8, 9]))}
        out.append(Grid(tuple(np.flatnonzero(numbers == number).tolist()), factor, phase, sections))
    return count, tuple(out)


def test_samples_of_grids_come_in_pieces():
    """Those that a smaller size needs first, of all grids."""
    rng = np.random.default_rng(0)
    fine = encode_wavelet(Wavelet(3, rng.bytes(9000), (10, 100, 1000, 4000)))
    coarse = encode_wavelet(Wavelet(4, rng.bytes(8200), (20, 200, 2000, 5000)))
    residual = rng.bytes(30)
    contents = {0: fine, 1: coarse, 2: residual, 3: b"small"}
    factors = {0: (1, WAVELET), 1: (3, WAVELET), 2: (2, RESIDUAL), 3: (16, WAVELET)}
    parts = tuple(Grid((n,), f, (0, 0), {6: b"map", kind: contents[n]}) for n, (f, kind) in factors.items())
    data = encode_structure(Structure(None, grids=parts))
    assert [grid.sections for grid in decode_structure(data, header("u2", 4)).grids] == [g.sections for g in parts]
    first = 20 + 4 * 7  # where the streams of both wavelets begin
    ends = {0: [0, first + 10, first + 100, first + 1000, first + 4000, len(fine)]}
    ends[1] = [0, first + 2000, first + 5000, *[len(coarse)] * 3]  # 1/4, 1/2, 1/1 of the grid
    ends |= {2: [0, *[30] * 5], 3: [0, *[5] * 5]}
    pieces = b"".join(contents[n][ends[n][i] : ends[n][i + 1]] for i in range(5) for n in range(4))
    assert data.endswith(pieces)
    place = len(data) - len(pieces)
    assert table_length(data[:place], header("u2", 4), len(data)) == place
    assert table_length(data[: place - 1], header("u2", 4), len(data)) > place
    for number, scale in enumerate((16, 8, 4, 2, 1), 1):
        length = grids_length(data[:place], header("u2", 4), len(data), scale)
        assert length == place + sum(ends[n][number] for n in range(4))
        started, whole = verified_grids(data[:length], header("u2", 4))
        sections = [list(grid.sections.values())[1] for grid in decode_structure(started, header("u2", 4)).grids]
        assert sections == [contents[n][: ends[n][number]] for n in range(4)]
        assert whole == tuple(ends[n][number] == len(contents[n]) for n in range(4))
    check_rejects(CorruptPayload, "section|40 bytes", verified_grids, data[: place + 40], header("u2", 4))


@given(grids(), st.integers(1, 40), st.integers(1, 40))
def test_grids_are_written_and_repeated(case, height, width):
    bands, expected = case
    data = encode_structure(Structure(None, grids=expected))
    decoded = decode_structure(data, header("u2", bands))
    assert encode_structure(decoded) == data and decoded.levels is None
    read = read_by_reference(data, "u2", bands).grids
    assert read == [reference.Grid(list(g.bands), g.factor, g.phase, g.sections) for g in expected]
    for grid in decoded.grids:
        rows, columns = grid.size(height, width)
        pixels = np.arange(rows * columns * len(grid.bands)).reshape(1, rows, columns, len(grid.bands))
        samples = np.zeros((1, height, width, bands), int)
        samples[..., list(grid.bands)] = grid.repeated(pixels, height, width)
        y, x = ((np.arange(size) + p) // grid.factor for size, p in zip((height, width), grid.phase, strict=True))
        np.testing.assert_array_equal(samples[0, ..., grid.bands[0]], pixels[0, y][:, x][..., 0])
        np.testing.assert_array_equal(grid.thinned(samples), pixels)
