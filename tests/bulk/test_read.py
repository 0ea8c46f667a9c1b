"""The array that Dask slices: what NumPy gives for the same key, from whole chunks."""

import numpy as np
import pytest

from deepsic_codec import DeepSIC, create_array
from deepsic_codec.bulk.read import BatchedArray
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.stored.array import StoredArray
from tests.common import check_rejects, photograph

pytestmark = pytest.mark.usefixtures("stub")
S = np.s_


@pytest.mark.parametrize(
    "key",
    [
        S[:],
        S[::-1],
        S[::-3, 5::-1],
        S[39:0:-1, ::-7, 2:0:-1],
        S[39:3:-40],
        S[-1],
        S[5, -3:, 1],
        S[7:7],
        S[[0, 38, 3]],
        S[:, [-1, 0, 0], ::-1],
        S[np.arange(40) % 3 == 0, 4],
        S[np.zeros(40, bool)],
        S[[]],
    ],
    ids=str,
)
def test_keys_of_every_kind(key):
    values = photograph(40, 52, 3)
    array = BatchedArray(StoredArray(create_array({}, data=values, chunks=(16, 16, 3))), 4)
    np.testing.assert_array_equal(array[key], values[key])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_payload_of_another_dtype_is_refused(zarr_format):
    codec = DeepSIC(axes="yx", max_error=0, semantics="none")
    source, array = (
        create_array({}, shape=(64, 64), dtype=dtype, chunks=(64, 64), codec=codec, zarr_format=zarr_format)
        for dtype in ("i1", "u1")
    )
    source[:] = -1
    array.store._store_dict.update({k: v for k, v in source.store._store_dict.items() if k[0] in "0c"})
    words = "chunk (0, 0) of the array|samples of int8, expected uint8"
    check_rejects(CorruptPayload, words, BatchedArray(StoredArray(array), 4).__getitem__, S[:])
