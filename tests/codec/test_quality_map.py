"""Quality maps of chunks: bits and errors where they belong, and what cannot be coded with one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec import DeepSIC, reference
from deepsic_codec.codec.reduced import needed_length
from deepsic_codec.errors import ConfigurationError, CorruptPayload
from deepsic_codec.payload import header as h
from deepsic_codec.payload.sections import FEATURES, NODATA, QUALITY_MAP, STRUCTURE, WAVELET
from tests.common import check_rejects, photograph
from tests.payload import crafted

pytestmark = pytest.mark.usefixtures("stub")


def codec(**options):
    return DeepSIC(**{"transform": "wavelet", "semantics": "none", "quality": 50} | options)


def marked(shape, inside=75.0, outside=25.0):
    """A map with a square of a quarter of the image in its middle, and that square."""
    height, width = shape[:2]
    place = np.s_[height // 64 * 16 : height // 64 * 48, width // 64 * 16 : width // 64 * 48]
    values = np.full((height, width), outside, np.float32)
    values[place] = inside
    return values, place


def error(found, original, place):
    return np.sqrt(np.square(found[place].astype("f8") - original[place]).mean())


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f4"])
def test_a_region_has_its_quality(dtype):
    image = (photograph(256, 256, 3).astype("f8") * (1 if dtype == "u1" else 50)).astype(dtype)
    values, place = marked(image.shape)
    options = {} if dtype == "u1" else {"value_range": (0, 12750)}
    payload = codec(**options).encode(image, values)
    decode = codec().decode
    found, fine, coarse = (
        decode(one)
        for one in (payload, codec(**options, quality=75).encode(image), codec(**options, quality=25).encode(image))
    )
    outside = np.s_[:48]
    assert error(found, image, place) < 1.05 * error(fine, image, place)
    assert error(found, image, outside) < 1.05 * error(coarse, image, outside)
    header = h.read_header(payload)
    assert header.quality == 75 and header.entry(QUALITY_MAP.kind).length < 40
    assert [one.kind for one in header.sections][-2:] == [QUALITY_MAP.kind, WAVELET.kind]


@pytest.mark.parametrize(
    "options", [{"quality": 80}, {"transform": "auto", "quality": 30}, {"quality": None, "bpp": 2}]
)
def test_a_constant_map_is_none(options):
    image = photograph(100, 90, 3)
    for constant in (30.0, 80):
        quality = {} if options.get("bpp") else {"quality": constant}
        wanted = codec(**options | quality).encode(image)
        for dtype in ("f4", "f8", "u1"):
            assert codec(**options).encode(image, np.full((100, 90), constant, dtype)) == wanted
    assert codec(**options).encode(image, np.ones((100, 90), bool)) == codec(**options).encode(image)


def test_a_map_makes_wavelets():
    image = photograph(64, 64, 3)
    auto = codec(transform="auto", quality=20)
    assert FEATURES in h.unpack(auto.encode(image)) and QUALITY_MAP in h.unpack(auto.encode(image, marked((64, 64))[0]))


def test_what_nobody_cares_for_takes_few_bytes():
    image = photograph(256, 256, 3)
    care = np.zeros((256, 256), bool)
    care[:, 64:192] = True
    whole, half = codec(quality=90).encode(image), codec(quality=90).encode(image, care)
    part = codec(quality=90).encode(np.ascontiguousarray(image[:, 64:192]))
    assert len(half) < 1.1 * len(part) < 0.7 * len(whole)
    found = codec().decode(half)
    assert error(found, image, np.s_[:, 64:192]) < 1.05 * error(codec().decode(whole), image, np.s_[:, 64:192])
    assert len(codec(quality=90).encode(image, np.zeros((256, 256)))) < 400


def test_no_data_needs_no_quality():
    image = photograph(128, 128, 3).astype("u2") * 40 + 1
    values, _ = marked(image.shape)
    image[:, :64] = 0
    payload = codec(nodata=0).encode(image, values)
    unpacked = h.unpack(payload)
    assert NODATA in unpacked and (unpacked.read(QUALITY_MAP).cells[:, :, :4] == 0).all()
    found = codec().decode(payload)
    assert (found[:, :64] == 0).all() and (found[:, 64:] != 0).all()


def test_bands_of_coarser_resolution_have_maps_of_their_own():
    image = photograph(128, 128, 2).astype("u2") * 40
    image[..., 1] = image[::2, ::2, 1].repeat(2, 0).repeat(2, 1)
    values, place = marked(image.shape, 120, 30)
    payload = codec(value_range=(0, 10200)).encode(image, values)
    grids = h.unpack(payload).read(STRUCTURE).grids
    assert len(grids) == 2 and all(QUALITY_MAP.kind in grid.sections for grid in grids)
    found = codec().decode(payload)
    assert error(found, image, place) < 0.3 * error(found, image, np.s_[:24])


def test_slices_have_maps_of_their_own():
    stack = np.stack([photograph(96, 96, 1, seed=i)[..., 0] for i in range(2)])
    values = np.full((2, 96, 96), 20.0)
    values[1] = 80
    cube = codec(axes="zyx")
    found = cube.decode(cube.encode(stack, values))
    assert error(found, stack, 1) < 0.7 * error(found, stack, 0)
    flat, _ = marked((96, 96))
    assert cube.encode(stack, flat) == cube.encode(stack, np.stack([flat, flat]))


def test_a_size_scales_the_map():
    image = photograph(256, 256, 3)
    values, place = marked(image.shape)
    sized = codec(quality=None, bpp=1.5)
    payload = sized.encode(image, values)
    assert abs(8 * len(payload) / 256**2 / 1.5 - 1) < 0.05
    found = codec().decode(payload)
    assert error(found, image, place) < 0.4 * error(found, image, np.s_[:48])


def test_reduced_sizes_follow_the_map():
    image = photograph(512, 512, 1) + np.random.default_rng(0).integers(0, 9, (512, 512, 1)).astype("u1")
    payload = codec(quality=90).encode(image, marked(image.shape, 95, 70)[0])
    length = needed_length(payload, h.read_header(payload), 8)
    assert length < 0.07 * len(payload)
    found = codec().decode_preview(payload[:length], 8)
    np.testing.assert_array_equal(found, codec().decode_preview(payload, 8))
    assert np.abs(found.astype(int) - codec().decode(payload)[::8, ::8]).mean() < 10


WRONG = {
    "shape": (np.zeros((64, 65)), "expected an array of shape (64, 64)|shape (64, 65)"),
    "bands": (np.zeros((64, 64, 3)), "shape (64, 64, 3)"),
    "NaN": (np.full((64, 64), np.nan), "qualities from 1 to 200, or 0"),
    "too small": (np.full((64, 64), 0.5), "qualities from 1 to 200, or 0"),
    "negative": (np.full((64, 64), -1), "qualities from 1 to 200, or 0"),
    "too large": (np.full((64, 64), 200.5), "qualities from 1 to 200, or 0"),
    "infinite": (np.full((64, 64), np.inf), "qualities from 1 to 200, or 0"),
    "text": (np.full((64, 64), "x"), "numbers or bool"),
    "a number": (3, "shape ()"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_maps_are_refused(name):
    values, words = WRONG[name]
    check_rejects(ConfigurationError, f"quality_map|{words}", codec().encode, photograph(64, 64, 3), values)


@pytest.mark.parametrize("options", [{"max_error": 1}, {"psnr": 40}, {"rmse": 1}, {"transform": "features"}], ids=str)
def test_other_targets_are_refused(options):
    coder = DeepSIC(**options)
    check_rejects(ConfigurationError, "quality_map", coder.encode, photograph(64, 64, 3), marked((64, 64))[0])


def test_a_map_needs_a_wavelet():
    payload = DeepSIC(max_error=0, semantics="none").encode(photograph(64, 64, 1))
    sections = h.unpack(payload).sections
    wrong = crafted.write(
        shape=(64, 64, 1),
        grid=(4, 4),
        decoder=reference.read_header(payload).decoder,
        sections=sorted((sections | {6: b"\0"}).items()),
    )
    check_rejects(CorruptPayload, "a quality map section without a wavelet", codec().decode, wrong)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(["yx", "yxc", "zyx"]), st.integers(0, 999))
def test_any_map_comes_through(height, width, axes, seed):
    """Decoding works in this process and from the payload alone."""
    rng = np.random.default_rng(seed)
    sizes = {"y": height, "x": width, "c": 2, "z": 2}
    image = photograph(height, width, 2)
    image = image[..., 0] if axes == "yx" else image.transpose(2, 0, 1) if axes == "zyx" else image
    shape = tuple(sizes[axis] for axis in axes if axis != "c")
    values = rng.choice(np.array([0, 1, 30, 90, 200], np.float32), shape)
    coder = codec(axes=axes)
    found = coder.decode(coder.encode(image, values))
    assert found.shape == image.shape
    if (values == 200).all():
        np.testing.assert_array_equal(found, image)
