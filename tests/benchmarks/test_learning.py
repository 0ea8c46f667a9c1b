import numpy as np
import pytest

from benchmarks.learning import average_precision, colours, histogram, pooled, precisions_of


def test_average_precision():
    truth = np.array([True, False, True, False])
    assert average_precision(np.array([4.0, 3, 2, 1]), truth) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([4.0, 2, 3, 1]), truth) == 1


def test_histograms_are_unit_vectors():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype("u1")
    assert histogram(image) @ histogram(image) == pytest.approx(1)
    assert histogram(np.full((4, 4, 3), 255, "u1"))[-1] == 1


def test_histograms_of_tiles_keep_their_products():
    image = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3)).astype("u1")
    image[1, :64] //= 3
    vectors = colours(image).astype(float) / 127
    products = vectors.reshape(8, -1) @ vectors.reshape(8, -1).T
    tiles = [image[i, y : y + 64, x : x + 64] for i in (0, 1) for y in (0, 64) for x in (0, 64)]
    expected = np.stack([histogram(tile) for tile in tiles])
    np.testing.assert_allclose(products, expected @ expected.T, atol=0.05)


def test_precisions_of_tiles_and_images():
    """Directions of tiles are noise around one of their image, so that tiles around help."""
    rng = np.random.default_rng(1)
    is_class, training = np.arange(120) % 3 == 0, np.arange(120) < 60
    directions = np.where(is_class[:, None, None, None], 10.0, -10.0) * np.eye(6)[0]
    vectors = (directions + rng.normal(0, 25, (120, 3, 3, 6))).round().clip(-127, 127).astype(np.int8)
    by_distance = pooled(vectors)
    assert [*by_distance] == [0, 1, 2] and by_distance[1].shape == (120, 9, 6)
    alone, near, far, chosen = precisions_of(by_distance, is_class, training, 10, 2)
    assert alone[0] + 0.05 < near[0] and alone[0] + 0.05 < far[0] and chosen[0] >= min(near[0], far[0])
