import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from benchmarks.metrics import Curve, bd_rate
from deepsic_codec import metrics
from deepsic_codec.metrics import luma, ms_ssim, psnr
from deepsic_codec.samples import drone_frame

BPP = np.array([0.1, 0.2, 0.4, 0.8, 1.6, 2.4])
DB = np.array([25.0, 28.0, 31.0, 34.5, 38.0, 40.0])


@pytest.fixture(scope="module")
def image():
    return drone_frame()[:208, 300:540]  # odd sizes at the small scales


def noisy(image, sigma, seed=0):
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(image + noise, 0, 255)


@given(st.integers(1, 100))
def test_psnr_of_a_constant_error(error):
    assert psnr(np.zeros((4, 5, 3), "u1"), np.full((4, 5, 3), error, "u1")) == pytest.approx(20 * np.log10(255 / error))


def test_psnr_of_equal_images_is_infinite_and_shapes_must_match(image):
    assert psnr(image, image) == np.inf
    with pytest.raises(ValueError, match="shapes differ"):
        psnr(image, image[1:])


def test_luma_keeps_grey_and_weighs_green_most():
    assert luma(np.full((2, 2, 3), 77)) == pytest.approx(77)
    assert luma(np.eye(3)) == pytest.approx([0.299, 0.587, 0.114])


def test_ms_ssim_is_one_for_equal_images_and_falls_with_noise(image):
    values = [ms_ssim(image, noisy(image, sigma)) for sigma in (0, 4, 12, 40)]
    assert values[0] == pytest.approx(1, abs=1e-6)
    assert values == sorted(values, reverse=True) and 0 < values[-1] < 0.9


def test_ms_ssim_forgives_brightness_more_than_noise_of_equal_error(image):
    image = np.clip(image, 20, 235)
    brighter = image.astype(float) + 10
    assert psnr(image, noisy(image, 10)) == pytest.approx(psnr(image, brighter), abs=0.1)
    assert ms_ssim(image, brighter) > ms_ssim(image, noisy(image, 10)) + 0.01


def test_ssim_terms_match_a_two_dimensional_filter(image):
    a, b = image[..., 0].astype("f8"), noisy(image, 9)[..., 0]
    offsets = np.arange(11) - 5
    taps = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2

    def mean(x):
        return ndimage.correlate(x, window)[5:-5, 5:-5]

    c1, c2 = 2.55**2, 7.65**2
    covariance = mean(a * b) - mean(a) * mean(b)
    variances = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    luminance = (2 * mean(a) * mean(b) + c1) / (mean(a) ** 2 + mean(b) ** 2 + c1)
    expected = luminance, (2 * covariance + c2) / (variances + c2)
    found = metrics._ssim_terms(a[..., None].astype("f4"), b[..., None].astype("f4"), 255)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[..., 0], other, atol=2e-3)


def test_ms_ssim_refuses_images_smaller_than_its_window(image):
    with pytest.raises(ValueError, match="176"):
        ms_ssim(image[:175], image[:175])


@given(st.floats(0.5, 2))
def test_bd_rate_of_a_scaled_rate_is_the_scale(factor):
    found = bd_rate(Curve(BPP, DB), Curve(BPP * factor, DB))
    assert found == pytest.approx(100 * (factor - 1), abs=1e-6)


def test_bd_rate_sees_only_the_range_it_is_asked_about():
    worse_at_the_top = Curve(BPP, [*DB[:-1], 38.1])
    assert bd_rate(Curve(BPP, DB), worse_at_the_top, (0.15, 0.4)) == pytest.approx(0, abs=0.5)
    assert bd_rate(Curve(BPP, DB), worse_at_the_top, (1.6, 2.4)) > 5


def test_bd_rate_without_common_quality_is_nan():
    assert np.isnan(bd_rate(Curve(BPP, DB), Curve(BPP, DB + 30)))


def test_curves_read_their_points_and_drop_those_that_cost_more_for_less():
    curve = Curve([*BPP, 0.5], [*DB, 20.0])
    assert curve.quality_at(0.4) == pytest.approx(31)
    assert 31 < curve.quality_at(0.5) < 34.5
    assert np.isnan(curve.quality_at(5))
    with pytest.raises(ValueError, match="two points"):
        Curve([1, 1], [30, 30])
