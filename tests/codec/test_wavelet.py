"""Chunks at the ends of dtypes and of targets, as wavelets."""

import numpy as np
import pytest

from deepsic_codec import DeepSIC
from deepsic_codec.codec.wavelet import LEFT_OUT_FROM
from deepsic_codec.payload import header as h
from deepsic_codec.payload.sections import RESIDUAL, SPECTRAL
from tests.common import photograph

pytestmark = pytest.mark.filterwarnings("error", "ignore:value_range", "ignore:samples look like a mask")

#: One of each, and all beyond what chunks reach; a target has to be met, or nearly so.
TARGETS = [
    {"quality": 1},
    {"quality": 200},
    {"psnr": 1e-9},
    {"psnr": 1e5},
    {"rmse": 1e-300},
    {"rmse": 1e300},
    {"bpp": 1e-9},
    {"bpp": 1e9},
]


@pytest.mark.parametrize("target", [*TARGETS, {"quality": 200, "value_range": (0, 1)}], ids=str)
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "f4"])
def test_extremes_of_a_dtype(dtype, target):
    """Low bands of six levels have the largest symbols: 68 times those of a plane that is not split."""
    info = np.finfo(dtype) if dtype == "f4" else np.iinfo(dtype)
    low, high = float(info.min), float(info.max)
    blocks = np.add.outer(np.arange(390) // 130, np.arange(390) // 130) % 2
    if dtype == "f4":
        target = target | {"value_range": "chunk"}
    for array in (np.full((390, 390), low), np.full((390, 390), high), np.where(blocks, low, high)):
        array = array.astype(dtype)
        codec = DeepSIC(axes="yx", semantics="none", transform="wavelet", **target)
        decoded = codec.decode(codec.encode(array)).astype("f8")
        assert np.isfinite(decoded).all()
        if 200 in target.values() or 1e5 in target.values():
            assert np.abs(decoded - array).max() <= (high - low) / 10000 + 1


@pytest.mark.parametrize("target", [{"rmse": 1e-9}, {"psnr": 300}, {"bpp": 1000}], ids=str)
def test_targets_out_of_reach_take_one_trial(target, monkeypatch):
    from deepsic_codec.codec import wavelet

    trials = []
    encode = wavelet.WaveletEncoder._encode
    monkeypatch.setattr(wavelet.WaveletEncoder, "_encode", lambda self, code: trials.append(code) or encode(self, code))
    DeepSIC(axes="yx", semantics="none", transform="wavelet", **target).encode(photograph(40, 50))
    assert len(trials) == 1


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_integers_in_steps_take_a_step_just_above_that_of_the_wavelet_error(seed):
    """Steps of 3, where the error of the wavelet is that of 2.9: steps of 2 take too many bytes."""
    noise = np.random.default_rng(seed).normal(1000, 2.4, (96, 96)).round().astype("u2")
    codec = DeepSIC(axes="yx", semantics="none", bpp=2)
    payload = codec.encode(noise)
    assert h.read_section(payload, h.read_header(payload), RESIDUAL) is not None
    assert 8 * len(payload) < 1.03 * 2 * noise.size
    error = np.sqrt(np.square(codec.decode(payload).astype("f8") - noise).mean())
    assert error < 0.823  # that of steps of 3 is 0.816; of the wavelets, at least 0.833


def mixed(bands, smooth=0.0):
    """Bands that share a busy image, their means, and a smooth image, uint16 (96, 96, bands)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96]
    first, second = rng.normal(size=(2, bands))
    busy, slope = 3000 * np.sin(x / 2) * np.cos(y / 3), smooth * (x / 95 - 0.5)
    values = 30000 + busy[..., None] * first + slope[..., None] * second + rng.normal(0, 3, (96, 96, bands))
    return values.clip(0, 65535).astype("u2")


def encoded(array, **parameters):
    """The number of components, of bytes, and the root mean square error."""
    codec = DeepSIC(semantics="none", transform="wavelet", **parameters)
    payload = codec.encode(array)
    difference = codec.decode(payload).astype("f8") - array
    matrix = h.unpack(payload).read(SPECTRAL)
    return len(matrix), len(payload), np.sqrt(np.square(difference).mean())


@pytest.mark.parametrize("bands", [LEFT_OUT_FROM - 1, LEFT_OUT_FROM, 40])
@pytest.mark.parametrize("quality", [40, 90, 120])
def test_components_below_the_step_are_left_out(bands, quality):
    step = 200 * 0.02 ** ((min(quality, 100) - 1) / 99) * 257 * 256 ** -(max(0, quality - 100) / 100)
    array = mixed(bands)
    components, _, error = encoded(array, quality=quality)
    assert (components < bands) == (bands >= LEFT_OUT_FROM)
    assert error < 0.4 * step  # that of means, which differences do not show, too
    assert encoded(array, quality=quality, spectral=np.eye(bands))[0] == bands  # the caller's keeps all rows


def test_components_without_detail_are_kept_for_what_they_add():
    """Neighbours in the smooth image differ by less than a quarter of a step, its ends by many steps."""
    array = mixed(20, smooth=4000)
    step = 4 * 257 / 256**0.3
    assert step / 4 > 4000 / 95 and encoded(array, quality=130)[2] < 0.4 * step


@pytest.mark.parametrize("target", [{"rmse": 5}, {"rmse": 100}, {"bpp": 1}, {"bpp": 10}], ids=str)
def test_targets_with_many_bands_are_met(target):
    """Rows of the matrix are a part of the bytes, and steps need different components."""
    array = mixed(60, smooth=4000)
    _, nbytes, error = encoded(array, **target)
    if "bpp" in target:
        assert abs(8 * nbytes / 96**2 / target["bpp"] - 1) < 0.05
    else:
        assert abs(error / target["rmse"] - 1) < 0.05


@pytest.mark.parametrize("value", [1, 777, 40000])
@pytest.mark.parametrize("rmse", [0.5, 3, 10, 70])
def test_errors_of_constants_are_within_the_target(value, rmse):
    """Their errors do not follow the step: they lie anywhere below half of it."""
    array = np.full((256, 256), value, "u2")
    codec = DeepSIC(axes="yx", semantics="none", transform="wavelet", rmse=rmse)
    assert np.abs(codec.decode(codec.encode(array)).astype(int) - value).max() <= rmse * 1.08


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_high_qualities_never_take_more_than_lossless(dtype):
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 4)).astype(dtype)
    lossless = len(DeepSIC(max_error=0, semantics="none").encode(array))
    errors = []
    for quality in (100, 130, 160, 200):
        codec = DeepSIC(quality=quality, value_range=(0, 255), semantics="none", transform="wavelet")
        payload = codec.encode(array)
        assert len(payload) <= lossless * 1.01
        errors.append(np.square(codec.decode(payload).astype("f8") - array).mean())
    assert errors[0] > 0 == errors[-1] and errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("target", [{"rmse": 40}, {"psnr": 64}], ids=str)
def test_padding_does_not_make_up_for_errors_of_data(target):
    array = np.zeros((128, 128), "u2")
    array[:, :30] = photograph(128, 30, seed=3).astype("u2") * 40 + 1000
    codec = DeepSIC(axes="yx", semantics="none", transform="wavelet", **target)
    difference = codec.decode(codec.encode(array)).astype("f8") - array
    error = np.sqrt(np.square(difference[:, :30]).mean())
    assert error < 1.05 * (40 if "rmse" in target else 65535 / 10**3.2)
