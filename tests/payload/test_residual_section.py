"""The residual section: how samples become integers and come back. `test_residual.py` tests how they are coded."""

from types import SimpleNamespace

import numpy as np
import pytest

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.nodata import NoData
from deepsic_codec.payload.residual import (
    FLOAT_BITS,
    FLOATS,
    Residual,
    bounded_residual,
    encode_residual,
    stepped_residual,
)


def header_of(samples):
    slices, height, width, bands = samples.shape
    return SimpleNamespace(dtype=samples.dtype, slices=slices, height=height, width=width, channels=bands)


def scene(dtype, seed=0):
    noise = np.random.default_rng(seed).normal(0, 20, (2, 24, 24, 3))
    return (1000 + noise.cumsum(axis=1)).astype(dtype)


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_samples_without_data_cost_nothing(dtype):
    """The NoData value lies far off, and would be most of the bytes."""
    samples = scene(dtype)
    mask = np.zeros(samples.shape, bool)
    mask[:, :12] = True
    holed = np.where(mask, samples.dtype.type(40000), samples)
    nodata = NoData(samples.dtype.type(40000), False, mask)
    half, whole = stepped_residual(holed, 2, nodata)[0], stepped_residual(samples, 2, None)[0]
    assert len(half.coded) < 0.7 * len(whole.coded)


@pytest.mark.parametrize("dtype", ["u2", "i2", "f4"])
@pytest.mark.parametrize("step", [1.0, 2.6, 5.0, 40.0])
def test_steps_come_back(dtype, step):
    samples = scene(dtype)
    residual, decoded = stepped_residual(samples, step, None)
    np.testing.assert_array_equal(residual.decode(header_of(samples), None), decoded)
    error = np.abs(decoded.astype("f8") - samples)
    assert error.max() <= step + 1e-3 and error.mean() >= 0.15 * (step - 1)


def test_a_fraction_of_a_step_saves_bytes():
    samples = scene("u2")
    sizes = [len(stepped_residual(samples, step, None)[0].coded) for step in (15.0, 15.99)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(("bound", "layout"), [(1.0, FLOATS), (1e-3, FLOATS), (1e-9, FLOAT_BITS)])
def test_floats_are_bounded(bound, layout):
    samples = scene("f4")
    samples[0, 0, 0] = -7.25, 0.0, 1e-30
    residual, decoded = bounded_residual(samples, bound, None)
    assert residual.layout == layout and np.abs(decoded - samples.astype("f8")).max() <= bound
    np.testing.assert_array_equal(residual.decode(header_of(samples), None), decoded)


@pytest.mark.parametrize("bands", [1, 3])
def test_bits_of_floats_under_a_mask(bands):
    samples = scene("f4")[..., :bands]
    mask = np.zeros((2, 24, 24, 1), bool)
    mask[0, 3:9] = True
    samples[mask[..., 0]] = np.nan
    nodata = NoData(np.float32(np.nan), False, mask)
    each = NoData(nodata.value, False, np.repeat(mask, bands, axis=-1))  # bands that agree are stored as one mask
    residual, decoded = bounded_residual(samples, 1e-9, each)
    assert residual.layout == FLOAT_BITS
    np.testing.assert_array_equal(decoded, samples)
    np.testing.assert_array_equal(residual.decode(header_of(samples), nodata)[~mask[..., 0]], samples[~mask[..., 0]])


def test_a_bound_holds_beside_a_nodata_value():
    """Data on both sides of the NoData value, from which what is decoded moves off."""
    samples = np.random.default_rng(0).choice(np.array([8, 9, 11, 12], "u1"), (1, 32, 32, 1))
    for bound in range(1, 5):
        _, decoded = bounded_residual(samples, bound, NoData(np.uint8(10), False, None))
        assert np.abs(decoded.astype(int) - samples).max() <= bound and not (decoded == 10).any()


def test_samples_beyond_the_dtype_are_refused():
    samples = scene("u2")
    residual, _ = stepped_residual(samples, 1, None)
    with pytest.raises(CorruptPayload, match="samples from"):
        residual.decode(header_of(samples.astype("u1")), None)
    bits, _ = bounded_residual(scene("f4"), 1e-9, None)
    wide = Residual(FLOAT_BITS, 1, 1.0, bits.coded[:3] + b"\xff\xff\x07" + bits.coded[5:])
    with pytest.raises(CorruptPayload):
        wide.decode(header_of(scene("f4")), None)


@pytest.mark.parametrize("dtype", ["f4", "u2"])
def test_the_last_bits_of_a_step_change_no_byte(dtype):
    """A step comes from a sum of errors, whose last bits depend on the version of NumPy and on the processor."""
    samples = np.random.default_rng(0).normal(500, 9, (1, 20, 30, 1)).astype(dtype)
    step = 2.3456789012345
    sections = [encode_residual(stepped_residual(samples, one, None)[0]) for one in (step, np.nextafter(step, 3))]
    assert sections[0] == sections[1]
