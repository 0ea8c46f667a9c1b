"""Label cells: without data and in padding they score nothing, and tiles take the best of their cells."""

from types import SimpleNamespace

import numpy as np
import pytest

from deepsic_codec.axes import Axes
from deepsic_codec.codec.decode import compute_cells, parse_payload
from deepsic_codec.codec.labels import (
    cells_with_data,
    cells_within,
    no_cells,
    tile_embeddings,
    tile_labels,
    with_best_leaves,
    without_implied,
)
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.payload import header
from deepsic_codec.payload.fields import COLOURS, PLANES
from deepsic_codec.payload.sections import FEATURES

FLAT = Vocabulary(("a", "b", "c"))
CELLS = np.arange(1, 1 + 2 * 3 * 2 * 4, dtype=np.uint8).reshape(2, 3, 2, 4)  # of chunks of 2 x 150 x 100 pixels


def test_cells_without_data():
    assert cells_with_data(CELLS, None) is CELLS
    mask = np.ones((2, 150, 100, 3), bool)
    mask[0, 32:64, 64:, 1] = False  # a band of half of the first row of cells, second column
    mask[0, 33:64, :64] = False  # less than half
    mask[1, 139:, :64, 0] = False  # half of the 22 rows at the end
    kept = cells_with_data(CELLS, mask)
    expected = np.zeros_like(CELLS)
    expected[0, 0, 1], expected[1, 2, 0] = CELLS[0, 0, 1], CELLS[1, 2, 0]
    np.testing.assert_array_equal(kept, expected)
    assert kept.dtype == np.uint8


@pytest.mark.parametrize(
    "axes,shape,valid,kept",
    [
        ("tyx", (2, 150, 100), (1, 65, 64), np.s_[:1, :2, :1]),
        ("yxt", (150, 100, 2), (64, 100, 2), np.s_[:, :1]),
        ("ytxc", (150, 2, 100, 3), (150, 1, 1, 3), np.s_[:1, :, :1]),
    ],
)
def test_cells_in_padding(axes, shape, valid, kept):
    expected = np.zeros_like(CELLS)
    expected[kept] = CELLS[kept]
    np.testing.assert_array_equal(cells_within(CELLS, Axes(axes), shape, valid), expected)


def test_tiles_take_the_best_cell():
    block = tile_labels(CELLS, FLAT, 150, 100, (128, 64))
    assert block.tile == (128, 64) and block.classes.shape[:3] == (2, 2, 2)
    np.testing.assert_array_equal(block.dense(4)[:, 0], np.where(CELLS[:, 1] < 8, 0, CELLS[:, 1]))
    np.testing.assert_array_equal(block.dense(4)[:, 1], CELLS[:, 2])
    assert tile_labels(CELLS, FLAT, 150, 100).tile == (64, 64)
    assert tile_labels(no_cells(1, 1000, 300, 5), FLAT, 1000, 300).tile == (256, 128)


def test_embeddings_of_tiles_are_means_of_cells_with_data():
    cells = CELLS.copy()
    cells[0, 0, :, 2:] = (128 + 7, 128 - 7)
    cells[0, 1, :, 2:] = (128 + 10, 128 - 12)
    cells[0, 1, 1] = 0  # without data
    embedding = tile_embeddings(cells, Vocabulary(("a",)), 150, 100, (128, 64))
    assert embedding.tile == (128, 64) and embedding.vectors.dtype == np.int8
    assert embedding.vectors[0, 0].tolist() == [[9, -9], [7, -7]]  # 8.5 and -9.5 are rounded up
    assert embedding.vectors.shape == (2, 2, 2, 2)
    assert not tile_embeddings(no_cells(1, 64, 64, 5), FLAT, 64, 64).vectors.any()
    assert tile_embeddings(cells, FLAT, 150, 100).vectors.shape[-1] == 0


def test_a_class_is_left_out_where_a_member_says_as_much():
    tree = Vocabulary(
        ("oak", "beech", "wood", "land"), {"wood": ("oak", "beech"), "land": ("wood",), "other": ("oak",)}
    )
    scores = np.array([[200, 10, 240, 255, 9], [90, 80, 240, 255, 9], [0, 0, 100, 240, 0]], np.uint8)
    kept = [[200, 10, 0, 0, 9], [90, 80, 240, 0, 9], [0, 0, 100, 240, 0]]
    np.testing.assert_array_equal(without_implied(scores, tree), kept)
    np.testing.assert_array_equal(without_implied(scores[:, :4], FLAT), scores[:, :4])
    assert [tree.members(name) for name in ("wood", "land", "other")] == [(0, 1, 2), (0, 1, 2, 3), (0,)]


def test_the_best_leaves_keep_their_places():
    """Broader classes score more than their members; "unknown", at the end, is no leaf."""
    names = ("oak", "beech", "sand", "wood", "land", "nature", "green", "open", "wild")
    tree = Vocabulary(names, dict.fromkeys(names[3:], names[:3]))
    scores = np.array([20, 7, 30, 90, 91, 92, 93, 94, 95, 99], np.uint8)
    kept = [20, 0, 30, 0, 0, 0, 0, 94, 95, 99]
    np.testing.assert_array_equal(with_best_leaves(np.tile(scores, (2, 1)), tree), [kept, kept])
    one = np.array([7, 7, 30, 90, 91, 92, 93, 94, 95, 0], np.uint8)
    np.testing.assert_array_equal(with_best_leaves(one, tree), [0, 0, 30, 0, 0, 92, 93, 94, 95, 0])
    leaves = np.array([200, 199, 198, 20, 20, 20, 0, 0, 0, 0], np.uint8)
    np.testing.assert_array_equal(with_best_leaves(leaves, tree), [200, 199, 198, 20, 20, 0, 0, 0, 0, 0])
    flat = Vocabulary(names, {"all": names})
    assert with_best_leaves(scores, flat) is scores, "a name that is no class has no place"
    block = tile_labels(scores.reshape(1, 1, 1, -1), tree, 64, 64)
    assert block.classes[0, 0, 0].tolist() == [9, 8, 7, 2, 0]


def test_no_cells():
    cells = no_cells(3, 65, 64, outputs=5)
    assert cells.shape == (3, 2, 1, 5) and cells.dtype == np.uint8 and not cells.any()


@pytest.mark.parametrize("bands,images", [(3, 1), (2, 2), (7, 7)])
def test_the_first_image_of_every_slice_is_scored(bands, images):
    """Stored features have all images of the first slice, then all of the second."""
    payload = parse_payload(
        header.pack(
            dtype="u1",
            shape=(4, 64, 64, bands),
            order="C",
            axes="tyxc",
            decoder=bytes(8),
            head=bytes(4),
            quality=50,
            grid=(4, 4),
            sections={FEATURES: b"features"},
            grouping=COLOURS if images == 1 else PLANES,
        )
    )
    assert payload.image_shape == (4 * images, 64, 64)
    numbers = np.arange(4 * images).astype(np.int16)
    scheduler = SimpleNamespace(
        decode_symbols=lambda features, shapes, quantisers: [
            np.broadcast_to(numbers[:, None, None, None], (len(numbers), 2, 4, 4))
        ],
        score=lambda symbols, shapes, quantisers: [one[:, :1, :1, :1].astype(np.uint8) for one in symbols],
    )
    (cells,) = compute_cells([payload], None, scheduler)
    assert cells.ravel().tolist() == [0, images, 2 * images, 3 * images]
