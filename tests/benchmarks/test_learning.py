import numpy as np
import pytest

from benchmarks.learning import average_precision, histogram


def test_average_precision():
    truth = np.array([True, False, True, False])
    assert average_precision(np.array([4.0, 3, 2, 1]), truth) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([4.0, 2, 3, 1]), truth) == 1


def test_histograms_are_unit_vectors():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype("u1")
    assert histogram(image) @ histogram(image) == pytest.approx(1)
    assert histogram(np.full((4, 4, 3), 255, "u1"))[-1] == 1
