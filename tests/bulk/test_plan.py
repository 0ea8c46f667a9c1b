from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec.bulk.plan import block_shape, check_region, default_batch_size
from deepsic_codec.errors import UnsupportedArray
from tests.common import check_rejects


def array(shape, chunks, shards=None):
    return SimpleNamespace(shape=shape, chunks=chunks, shards=shards)


IMAGE = array((300, 500, 3), (64, 64, 3))


@pytest.mark.parametrize("region", [None, ..., (), (..., slice(None)), slice(None), (slice(0, 300), slice(0, 900))])
def test_region_of_all(region):
    assert check_region(IMAGE, region) == (slice(0, 300), slice(0, 500), slice(0, 3))


def test_region_of_whole_chunks_and_the_edge():
    region = (slice(64, 192), slice(-52, None))
    assert check_region(IMAGE, region) == (slice(64, 192), slice(448, 500), slice(0, 3))


@pytest.mark.parametrize(
    "region, aligned",
    [
        ((slice(10, 100), slice(64, 128)), "(0:128, 64:128, 0:3)"),
        ((slice(256, 299),), "(256:300, 0:500, 0:3)"),
        ((..., slice(0, 1)), "(0:300, 0:500, 0:3)"),
    ],
)
def test_region_that_cuts_chunks_is_refused_with_the_aligned_one(region, aligned):
    check_rejects(UnsupportedArray, f"cuts chunks of (64, 64, 3)|aligned region|{aligned}", check_region, IMAGE, region)


def test_region_that_cuts_shards_is_refused():
    sharded = array((300, 500, 3), (64, 64, 3), (128, 128, 3))
    check_rejects(UnsupportedArray, "cuts shards|(0:128, 0:500, 0:3)", check_region, sharded, slice(0, 64))


@pytest.mark.parametrize("region", [(slice(0, 64, 2),), (slice(5, 5),), (3,), (slice(None),) * 4, (slice(600, 700),)])
def test_invalid_regions_are_refused(region):
    check_rejects(UnsupportedArray, "region", check_region, IMAGE, region)


sizes = st.tuples(*[st.integers(1, 400)] * 3)


@given(sizes, sizes, sizes, st.tuples(*[st.integers(1, 3)] * 3), st.booleans(), st.integers(1, 40))
def test_blocks_are_whole_units_and_of_about_a_batch(shape, chunks, source, per_shard, sharded, batch):
    shards = tuple(c * n for c, n in zip(chunks, per_shard, strict=True)) if sharded else None
    unit = shards or chunks
    block = block_shape(array(shape, chunks, shards), "tyx", source, batch)
    assert all(b % u == 0 for b, u in zip(block, unit, strict=True))
    count = 1
    for b, c in zip(block, chunks, strict=True):
        count *= b // c
    per_unit = per_shard[0] * per_shard[1] * per_shard[2] if sharded else 1
    assert count < 2 * max(batch, per_unit)
    assert count >= batch or all(b >= s for b, s in zip(block, shape, strict=True))


def test_blocks_follow_the_chunks_of_the_source():
    assert block_shape(array((4096, 4096), (64, 64)), "yx", (64, 4096), 16) == (64, 1024)
    assert block_shape(array((4096, 4096), (64, 64)), "yx", (4096, 64), 16) == (1024, 64)
    assert block_shape(array((4096, 4096), (64, 64)), "yx", (4096, 4096), 16) == (256, 256)
    assert block_shape(array((50, 64, 64), (1, 64, 64)), "tyx", (1, 64, 64), 16) == (16, 64, 64)


@pytest.mark.parametrize(
    ("chunks", "axes", "gpu", "count"),
    [
        ((512, 512, 3), "yxc", False, 16),
        ((512, 512, 3), "yxc", True, 256),
        ((64, 64, 3), "yxc", True, 256),
        ((3, 1024, 1024), "cyx", True, 64),
        ((4, 512, 512), "tyx", True, 64),
        ((1 << 14, 1 << 14, 3), "yxc", True, 16),
    ],
)
def test_a_gpu_gets_larger_batches(chunks, axes, gpu, count):
    assert default_batch_size(array((0,), chunks), axes, gpu) == count
