"""The embedding section: what was written is read, and wrong bytes are refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import reference
from deepsic_codec.axes import Axes
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload import header as h
from deepsic_codec.payload.embedding import Embedding, tile_vectors
from deepsic_codec.payload.sections import EMBEDDING
from tests.common import check_rejects
from tests.payload import crafted

HEADER = h.read_header(crafted.write(shape=(130, 70, 3)))  # 3 x 2 cells
SECTION = b"\x80\x01\x40\x02" + bytes(range(8))  # tiles of 128 x 64: 2 x 2 of 2 values


@given(
    tile=st.tuples(*[st.integers(1, 3).map(lambda n: 64 * n)] * 2),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 3)),
    values=st.integers(1, 255),
    seed=st.integers(0, 99),
)
def test_round_trip(tile, size, values, seed):
    height, width, slices = size
    header = replace(HEADER, axes=Axes("tyxc"), shape=(slices, height, width, 3))
    grid = slices, -(-height // tile[0]), -(-width // tile[1]), values
    vectors = np.random.default_rng(seed).integers(-127, 128, grid).astype(np.int8)
    data = EMBEDDING.encode(Embedding(tile, vectors))
    decoded = EMBEDDING.decode(data, header)
    assert decoded.tile == tile
    shape, grid = (slices, height, width, 3), (-(-height // 16), -(-width // 16))
    sections = ((7, b"features"), (EMBEDDING.kind, data))
    payload = crafted.write(axes=b"\x14\x32", shape=shape, grid=grid, sections=sections)
    by_reference = reference.embedding(payload)
    assert by_reference[0] == tile and np.array_equal(by_reference[1], vectors)
    np.testing.assert_array_equal(decoded.vectors, vectors)


def test_layout():
    decoded = EMBEDDING.decode(SECTION, HEADER)
    assert decoded.tile == (128, 64) and decoded.vectors[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert EMBEDDING.encode(decoded) == SECTION and not EMBEDDING.required


@pytest.mark.parametrize("end", range(len(SECTION)))
def test_cut_at_every_byte(end):
    check_rejects(CorruptPayload, "embedding section", EMBEDDING.decode, SECTION[:end], HEADER)


@pytest.mark.parametrize(
    "data,words",
    [
        (SECTION + b"\0", "13 bytes, expected 12"),
        (b"\x80\x01\x41\x02" + bytes(8), "tile 128 x 65"),
        (b"\x80\x01\x40\x00", "no values"),
        (SECTION[:-1] + b"\x80", "-128"),
    ],
)
def test_wrong_content(data, words):
    check_rejects(CorruptPayload, words, EMBEDDING.decode, data, HEADER)
    payload = crafted.write(shape=(130, 70, 3), grid=(9, 5), sections=((7, b"features"), (EMBEDDING.kind, data)))
    check_rejects(reference.Damaged, "embedding section", reference.embedding, payload)


def test_the_section_table_announces_no_more_than_a_chunk_can_have():
    largest = 11 + 255 * 6
    sound = crafted.write(shape=(130, 70, 3), sections=((7, b"features"), (0x8B, bytes(largest))))
    assert h.read_header(sound).entry(EMBEDDING.kind).length == largest
    longer = crafted.write(shape=(130, 70, 3), sections=((7, b"features"), (0x8B, bytes(largest + 1))))
    check_rejects(CorruptPayload, "of an embedding, expected at most", h.read_header, longer)


def test_mean_of_cells():
    cells = np.full((1, 2, 2, 2), 128, np.uint8)
    cells[0, 0, 0] = 128 + 3, 128 - 3
    assert tile_vectors(cells, (128, 128)).tolist() == [[[[1, -1]]]]
    cells[0, 1] = 0
    assert tile_vectors(cells, (128, 128)).tolist() == [[[[2, -1]]]]  # halves are rounded up
