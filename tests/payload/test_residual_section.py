"""The residual section: how integers are chosen and applied. `test_residual.py` tests how they are coded."""

import numpy as np
import pytest

from deepsic_codec.payload.nodata import NoData
from deepsic_codec.payload.residual import stepped_residual


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_samples_without_data_cost_nothing(dtype):
    """The NoData value lies far off what fills its place, and a residual of that size would be most of the bytes."""
    samples = np.full((1, 8, 8, 1), 1000, dtype)
    decoded = np.full_like(samples, 1005)
    mask = np.zeros(samples.shape, bool)
    mask[0, :4] = True
    samples[mask] = 40000
    residual = stepped_residual(samples, decoded, 2, NoData(samples.dtype.type(40000), False, mask))
    assert not residual.integers[mask].any()
    assert residual.integers[~mask].all()
