from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from deepsic_codec import config, reference
from deepsic_codec.errors import ConfigurationError, CorruptPayload, UnsupportedArray
from deepsic_codec.payload import labels as lb
from tests.common import check_rejects

SCORES = npst.arrays(
    "u1",
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 12)),
    # Few values, many of them equal: ties and faint scores are the cases.
    elements=st.sampled_from([0, 1, 7, 8, 9, 200, 254, 255]),
)
TILES = st.tuples(st.sampled_from([64, 128, 192, 1 << 20]), st.sampled_from([64, 320, 1 << 14]))


def encode(scores, tile):
    return lb.encode_labels(lb.best_labels(scores, tile))


def header_for(grid, tile, short=0):
    """Only what labels need of a header: a chunk with this many slices, tile rows and tile columns."""
    return SimpleNamespace(slices=grid[0], height=grid[1] * tile[0] - short, width=grid[2] * tile[1] - short)


def expected(tile):
    """What is to be kept of one tile's scores, as pairs (class, score)."""
    best = sorted(((-score, number) for number, score in enumerate(tile.tolist()) if score >= lb.MIN_SCORE))
    return [(number, -negative) for negative, number in best[:5]]


@settings(deadline=None)
@given(SCORES, TILES, st.integers(0, 63))
def test_what_was_encoded_is_decoded(scores, tile, short):
    header = header_for(scores.shape, tile, short)
    section = encode(scores, tile)
    with config.set(max_pixels=1 << 40):
        block = lb.decode_labels(section, header)
    assert block.tile == tile
    assert block.classes.dtype == block.scores.dtype == np.uint8 and block.classes.shape == block.scores.shape
    wanted = {place: expected(scores[place]) for place in np.ndindex(scores.shape[:3])}
    assert block.classes.shape == (*scores.shape[:3], max(map(len, wanted.values())))
    dense = block.dense(scores.shape[3])
    assert dense.shape == scores.shape and dense.dtype == np.uint8
    for place, pairs in wanted.items():
        filled = pairs + [(lb.NO_CLASS, 0)] * (block.classes.shape[3] - len(pairs))
        assert [*zip(block.classes[place].tolist(), block.scores[place].tolist(), strict=True)] == filled
        assert {number: score for number, score in enumerate(dense[place].tolist()) if score} == dict(pairs)
    read, pairs = reference.read_labels(section, (header.slices, header.height, header.width, 1))
    assert read == tile
    np.testing.assert_array_equal(pairs, np.stack([block.classes, block.scores], axis=-1))


def test_labels_of_a_tile_do_not_depend_on_its_neighbours():
    faint = np.array([lb.MIN_SCORE - 1, 100, 0], "u1")
    busy = np.array([50, 60, 70], "u1")
    block = lb.decode_labels(encode(np.array([[[faint, busy]]]), (64, 64)), header_for((1, 1, 2), (64, 64)))
    assert block.classes.tolist() == [[[[1, 255, 255], [2, 1, 0]]]]


def test_a_chunk_that_shows_nothing_costs_three_bytes():
    section = encode(np.zeros((5, 1, 1, 9), "u1"), (64, 64))
    assert section == b"\x40\x40\x00"
    block = lb.decode_labels(section, header_for((5, 1, 1), (64, 64)))
    assert block.classes.shape == (5, 1, 1, 0) and not block.dense(9).any() and block.dense(9).shape == (5, 1, 1, 9)


def test_scores_may_be_any_view():
    scores = np.arange(2 * 3 * 4 * 9, dtype="u1").reshape(2, 3, 4, 9)
    assert encode(np.asfortranarray(scores)[..., ::-1], (64, 64)) == encode(scores[..., ::-1].copy(), (64, 64))


def test_equal_scores_of_many_classes_stand_by_number():
    scores = np.full((1, 1, 1, 255), 100, "u1")
    scores[..., 200:] = 101
    assert encode(scores, (64, 64))[3::2] == bytes(range(200, 205))


def test_all_classes_but_the_reserved_one():
    scores = np.zeros((1, 1, 1, 255), "u1")
    scores[..., 254] = 255
    block = lb.decode_labels(encode(scores, (64, 64)), header_for((1, 1, 1), (64, 64)))
    assert block.classes.tolist() == [[[[254]]]]
    np.testing.assert_array_equal(block.dense(255), scores)
    check_rejects(CorruptPayload, "labels|class 254|254 classes", block.dense, 254)


@pytest.mark.parametrize("tile", [(0, 64), (64, 65), (32, 64), (64, -64), (64, 1 << 32)])
def test_tiles_that_cannot_be_stored(tile):
    check_rejects(ConfigurationError, "label tile|64", lb.best_labels, np.zeros((1, 1, 1, 3), "u1"), tile)
    check_rejects(ConfigurationError, "label tile|64", lb.tile_scores, np.zeros((1, 1, 1, 3), "u1"), tile)


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros((1, 1, 1, 3), "f4"),
        np.zeros((1, 1, 3), "u1"),
        np.zeros((1, 1, 1, 256), "u1"),
        np.zeros((1, 1, 1, 0), "u1"),
        np.zeros((0, 1, 1, 3), "u1"),
    ],
)
def test_scores_that_are_none(scores):
    check_rejects(ValueError, "scores", lb.best_labels, scores, (64, 64))


def test_too_many_tiles():
    scores = np.broadcast_to(np.uint8(0), (lb.MAX_TILES + 1, 1, 1, 1))
    check_rejects(UnsupportedArray, f"{lb.MAX_TILES}|larger tiles", lb.best_labels, scores, (64, 64))


@settings(deadline=None)
@given(st.integers(1, 1 << 31), st.integers(1, 1 << 31))
def test_default_tile(height, width):
    for size, length in zip((height, width), lb.default_tile(height, width), strict=True):
        assert length % 64 == 0 and -(-size // length) <= 4
        assert length == 64 or -(-size // (length - 64)) > 4  # none smaller would do
        assert 64 <= length <= lb.MAX_TILE


@settings(deadline=None)
@given(SCORES, TILES)
def test_a_tile_shows_what_one_of_its_cells_shows(cells, tile):
    tiles = lb.tile_scores(cells, tile)
    step = tile[0] // 64, tile[1] // 64
    assert tiles.shape[1:3] == tuple(-(-cells.shape[axis] // step[axis - 1]) for axis in (1, 2))
    for s, r, c in np.ndindex(tiles.shape[:3]):
        part = cells[s, r * step[0] : (r + 1) * step[0], c * step[1] : (c + 1) * step[1]]
        np.testing.assert_array_equal(tiles[s, r, c], part.max(axis=(0, 1)))


@settings(deadline=None)
@given(SCORES, TILES)
def test_a_tile_may_show_what_its_cells_show_as_a_whole(cells, tile):
    """Against the definition in float64, which ties may move by one."""
    has_data = cells[..., 0] % 3 > 0
    tiles = lb.tile_scores(cells, tile, "mean", has_data)
    step = tile[0] // 64, tile[1] // 64
    for s, r, c in np.ndindex(tiles.shape[:3]):
        at = s, slice(r * step[0], (r + 1) * step[0]), slice(c * step[1], (c + 1) * step[1])
        part = cells[at][has_data[at]].astype(float)
        if not len(part):
            assert not tiles[s, r, c].any()
            continue
        odds = np.log((part + 0.5) / (255.5 - part)).mean(axis=0)
        np.testing.assert_allclose(tiles[s, r, c], 256 / (1 + np.exp(-odds)) - 0.5, atol=0.75)


def test_the_mean_of_log_odds_of_one_cell_is_its_score():
    cells = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, -1)
    np.testing.assert_array_equal(lb.tile_scores(cells, (64, 64), "mean"), cells)
    sure, doubtful = (np.array([[[[score]], [[score]], [[255 - score]]]], np.uint8) for score in (240, 180))
    assert [int(lb.tile_scores(cells, (192, 64), "mean").item()) for cells in (sure, doubtful)] == [182, 146]
