"""The filter at the end of wavelets."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import DeepSIC, reference
from deepsic_codec.codec import wavelet
from deepsic_codec.codec.wavelet_filter import WEIGHTS, filter_plane
from deepsic_codec.payload import header as h
from deepsic_codec.payload.sections import WAVELET
from deepsic_codec.payload.steps import STEPS, step_of
from deepsic_codec.samples import drone_frame
from tests.common import ROOT, photograph, psnr

WAVELETS = {"transform": "wavelet", "semantics": "none", "axes": "yxc"}


def wavelet_of(payload):
    return h.read_section(payload, h.read_header(payload), WAVELET)


@st.composite
def any_plane(draw):
    """Edges, noise and slopes of any size in steps, and of any shape."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 90)))
    code = draw(st.integers(0, STEPS - 1))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.normal(size=shape) * draw(st.sampled_from([0.3, 3, 40]))
    if draw(st.booleans()):
        values = values.cumsum(0).cumsum(1)
    return (16 * step_of(code) * values).clip(-(2.0**31), 2.0**31 - 1).astype(np.int32), code


@given(any_plane())
def test_second_decoder_agrees(case):
    plane, code = case
    np.testing.assert_array_equal(filter_plane(plane.copy(), code), reference.corrected(plane.astype(int), code))


@pytest.mark.parametrize("value", [-(2**31), -12345, 0, 77, 2**31 - 1])
@pytest.mark.parametrize("code", [0, 2000, STEPS - 1])
def test_a_constant_plane_stays(value, code):
    plane = np.full((9, 14), value, np.int32)
    assert (filter_plane(plane.copy(), code) == value).all()


def test_samples_do_not_depend_on_what_is_far_away():
    """As chunks are: their edges are the ends of the plane."""
    plane = photograph(60, 80).astype(np.int32) << 4
    plane[0, 0], plane[-1, -1] = 0, 4080  # of both
    part = plane.copy()
    part[40:, 50:-1] += 160
    same = filter_plane(plane.copy(), 2600)[:34, :44] == filter_plane(part, 2600)[:34, :44]
    assert same.all()


@pytest.mark.parametrize(("quality", "gain"), [(20, 0.1), (40, 0.1), (60, 0.02)])
def test_photographs_gain(quality, gain, monkeypatch):
    image = np.ascontiguousarray(drone_frame()[100:356, 1000:1256])
    codec = DeepSIC(quality=quality, **WAVELETS)
    payload = codec.encode(image)
    with_filter = psnr(codec.decode(payload), image)
    monkeypatch.setattr(wavelet, "_filtered", lambda _, components: components)
    assert with_filter > psnr(codec.decode(payload), image) + gain


def test_who_is_filtered():
    image = np.ascontiguousarray(drone_frame()[100:356, 1000:1256])
    assert wavelet_of(DeepSIC(quality=40, **WAVELETS).encode(image)).filtered
    noise = np.random.default_rng(0).normal(128, 30, image.shape).clip(0, 255)
    assert not wavelet_of(DeepSIC(quality=40, **WAVELETS).encode(noise.astype("u1"))).filtered
    assert not wavelet_of(DeepSIC(**WAVELETS).encode(np.full((64, 64, 3), 7, "u1"))).filtered  # nothing to gain


def test_gains_are_those_of_whole_samples():
    """Where most samples come back as they were, corrections of less than a half can only harm."""
    rng = np.random.default_rng(1)
    image = (2000 + rng.integers(-1, 2, (128, 128)) + 40 * (np.arange(128) // 32 % 2)).astype("u2")
    part = wavelet._Part.__new__(wavelet._Part)
    part.matrix = None
    components = (image.astype(np.int32) << 4)[None, None]
    np.testing.assert_array_equal(part._rounded(components + 7), image[None, None])


def test_weights_are_those_of_the_page():
    page = (ROOT / "docs" / "wavelet.md").read_text()
    text = re.search(r"<!-- filter -->\n```text\n(.*?)```", page, re.S)[1]
    assert text == WEIGHTS.read_text() and text.replace("\n", "") == reference.FILTER
    weight, _, _ = reference.filter_layers()[0]
    assert not weight.sum((1, 2)).any()
