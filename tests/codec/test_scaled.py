"""A chunk as the networks see it: the PSNR that a search aims at."""

import numpy as np
import pytest

from deepsic_codec import DeepSIC
from deepsic_codec.codec.scaled import scale_chunk


@pytest.mark.parametrize("value_range,peaks", [(None, (255, 255)), ([(0, 100), (0, 200)], (100, 200))])
def test_psnr_is_that_of_the_samples_that_hold_data(value_range, peaks):
    samples = np.full((2, 4, 5, 2), 60, "u1")
    samples[0, :2] = 7  # no data
    samples[1, 3, 4, 1] = 7
    decoded = samples.copy()
    decoded[..., 0] += 3
    decoded[..., 1] += 5
    decoded[samples == 7] = 200  # whatever the features bring back there
    chunk = scale_chunk(samples, DeepSIC(axes="tyxc", nodata=7, value_range=value_range))
    counts = 80 // 2 - 10, 80 // 2 - 11
    squares = [count * (error / peak) ** 2 for count, error, peak in zip(counts, (3, 5), peaks, strict=True)]
    assert chunk.psnr(decoded) == pytest.approx(-10 * np.log10(sum(squares) / sum(counts)))
    decoded[samples != 7] = 60
    assert chunk.psnr(decoded) == float("inf")
