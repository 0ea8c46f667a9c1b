"""The filter at the end of wavelets."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import DeepSIC, reference
from deepsic_codec.codec import wavelet, wavelet_filter
from deepsic_codec.codec.wavelet_filter import WEIGHTS, filter_plane
from deepsic_codec.payload import header as h
from deepsic_codec.payload.coders import subbands
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


@pytest.mark.parametrize(("height", "width"), [(128, 1), (129, 2), (197, 5), (260, 7)])
def test_narrow_planes_are_filtered_in_long_rows(height, width, monkeypatch):
    """Sums are computed for many squares of a row at a time, which rows of a narrow plane do not have."""
    parts, run = [], wavelet_filter._filter
    monkeypatch.setattr(wavelet_filter, "TURNED_ROWS", 64)
    monkeypatch.setattr(wavelet_filter, "_filter", lambda part, *rest: parts.append(part.shape) or run(part, *rest))
    plane = (photograph(height, width).astype(np.int32) << 4) + np.arange(height * width).reshape(height, width) // 5
    plane = plane.astype(np.int32)
    np.testing.assert_array_equal(filter_plane(plane.copy(), 2600), reference.corrected(plane.astype(int), 2600))
    assert parts[0] == (width, 64 + wavelet_filter.REACH)


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


@pytest.mark.parametrize(("edge", "quality"), [(64, 70), (160, 75)])
def test_gains_are_those_of_whole_samples(edge, quality, monkeypatch):
    """Where most samples come back as they were, corrections of components that are less than a half can only harm."""
    slope = (np.add.outer(np.arange(edge), np.arange(edge)) // 4).astype("u1")
    codec = DeepSIC(transform="wavelet", semantics="none", axes="yx", quality=quality)
    payload = codec.encode(slope)
    assert not wavelet_of(payload).filtered
    monkeypatch.setattr(wavelet._Part, "filter_gains", lambda *_: True)
    assert psnr(codec.decode(payload), slope) > psnr(codec.decode(codec.encode(slope)), slope)


@pytest.mark.parametrize(("edge", "bands", "trials"), [(64, 3, 0), (128, 3, 0), (64, 17, 0), (129, 3, 1), (129, 17, 1)])
def test_a_small_chunk_is_not_coded_again_for_the_trial(edge, bands, trials, monkeypatch):
    """Of 17 bands that are alike, three components are coded."""
    coded = []
    encode = subbands.encode_planes
    monkeypatch.setattr(subbands, "encode_planes", lambda *args, **kw: coded.append(args) or encode(*args, **kw))
    image = np.concatenate([photograph(edge, edge, 3)] * 6, -1)[..., :bands]
    DeepSIC(quality=40, **WAVELETS).encode(image)
    assert len(coded) == 1 + trials


def test_a_search_for_bytes_tries_the_filter_once(monkeypatch):
    tries, coded = [], []
    gains, encode = wavelet._Part.filter_gains, subbands.encode_planes
    monkeypatch.setattr(wavelet._Part, "filter_gains", lambda *args: tries.append(args) or gains(*args))
    monkeypatch.setattr(subbands, "encode_planes", lambda *args, **kw: coded.append(args) or encode(*args, **kw))
    DeepSIC(bpp=0.3, **WAVELETS).encode(np.ascontiguousarray(drone_frame()[:64, 768:832]))
    assert len(tries) == 1 < len(coded)


@pytest.mark.parametrize(
    ("y", "x", "options"),
    [
        (128, 704, {"quality": 50}),
        (512, 640, {"quality": 50}),
        (0, 768, {"bpp": 0.3}),  # the last trial of these searches is not the best one
        (448, 768, {"bpp": 0.3}),
        (64, 704, {"quality": 50, "nodata": 0}),
        (64, 64, {"quality": 50, "others": 10}),
        (0, 768, {"quality": 50, "nodata": 0, "in bands": 1}),
        (192, 64, {"quality": 50, "contrast": 3}),  # decoded samples are clipped
        (128, 384, {"quality": 50, "gap": 48}),  # and become the nearest level
    ],
    ids=str,
)
def test_a_small_chunk_is_filtered_where_that_lowers_its_error(y, x, options, monkeypatch):
    """The error of its own step, in what is data and has the finest step."""
    options = dict(options)
    image, quality_map = np.maximum(drone_frame()[y : y + 64, x : x + 64], 1), None
    image = np.minimum(image * float(options.pop("contrast", 1)), 255).astype("u1")
    gap = options.pop("gap", 1)
    image, counted = image // gap * gap, np.ones(image.shape, bool)
    if "nodata" in options:
        counted[..., : options.pop("in bands", 3)] = np.add.outer(np.arange(64), np.arange(64))[..., None] <= 40
        image[~counted] = 0
    if "others" in options:  # noise at a low quality, whose errors are much larger
        counted[:] = False
        counted[16:32, 16:48] = True
        quality_map = np.where(counted[..., 0], options["quality"], options.pop("others"))
        noise = np.random.default_rng(0).normal(128, 40, image.shape).clip(0, 255)
        image = np.where(counted, image, noise).astype("u1")
    codec, errors = DeepSIC(**options, **WAVELETS), []
    filtered = wavelet_of(codec.encode(image, quality_map)).filtered
    for answer in (False, True):
        monkeypatch.setattr(wavelet._Part, "filter_gains", lambda *_, answer=answer: answer)
        decoded = codec.decode(codec.encode(image, quality_map))
        errors.append(np.square(decoded[counted].astype(int) - image[counted]).sum())
    assert filtered == (wavelet.LEAST_GAIN * (errors[0] - errors[1]) > errors[0])


def test_weights_are_those_of_the_page():
    page = (ROOT / "docs" / "wavelet.md").read_text()
    text = re.search(r"<!-- filter -->\n```text\n(.*?)```", page, re.S)[1]
    assert text == WEIGHTS.read_text() and text.replace("\n", "") == reference.FILTER
    weight, _, _ = reference.filter_layers()[0]
    assert not weight.sum((1, 2)).any()
