"""The quality map section: values of cells, the wavelets that follow them, a second decoder, hostile streams."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec import reference
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload import header as h
from deepsic_codec.payload.coders.cells import decode_cells, encode_cells
from deepsic_codec.payload.coders.subbands import decode_planes, encode_planes
from deepsic_codec.payload.coders.wavelet import LOW, bands_of
from deepsic_codec.payload.quality_map import QualityMap, encode_quality_map, grid_of
from deepsic_codec.payload.sections import QUALITY_MAP
from deepsic_codec.payload.steps import STEPS, step_code
from deepsic_codec.payload.wavelet import to_coefficients, to_components
from tests.common import check_rejects
from tests.payload import crafted


@st.composite
def any_cells(draw, shape=None):
    shape = shape or draw(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    cells = rng.choice(np.array(draw(st.lists(st.integers(0, 127), min_size=1, max_size=5)), np.uint8), shape)
    if draw(st.booleans()):  # areas
        cells[:, 1:] = np.where(rng.random(cells[:, 1:].shape) < 0.8, cells[:, :1], cells[:, 1:])
    if draw(st.booleans()):
        cells[:] = cells[:1]
    return cells


def planes(shape, size):
    rng = np.random.default_rng(1)
    y, x = np.mgrid[: shape[2], : shape[3]]
    return np.rint(size * (np.sin(y / 5) * np.cos(x / 7) + rng.laplace(0, 0.3, shape))).astype(np.int32)


@settings(deadline=None)
@given(any_cells())
def test_cells_come_back(cells):
    before = cells.copy()
    data = encode_cells(cells)
    np.testing.assert_array_equal(cells, before)
    np.testing.assert_array_equal(decode_cells(data, cells.shape), cells)
    slices, rows, columns = cells.shape
    section = encode_quality_map(QualityMap(cells))
    read = reference.read_cells(section, (slices, 16 * rows - 3, 16 * columns))
    np.testing.assert_array_equal(read, cells)


def test_even_areas_take_few_bytes():
    cells = np.full((4, 32, 32), 24, np.uint8)
    assert len(encode_cells(cells)) <= 8
    cells[:, 8:20, 5:17] = 1
    assert len(encode_cells(cells)) <= 40
    assert len(encode_cells(np.random.default_rng(0).integers(0, 128, (1, 32, 32)).astype("u1"))) < 1024 * 7 / 8 * 1.1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (13, 40), (100, 33), (64, 128)])
def test_coefficients_have_the_values_of_the_cells_that_they_reach(height, width):
    cells = np.random.default_rng(height).choice(np.array([0, 0, 1, 5, 30], np.uint8), (2, *grid_of(height, width)))
    for band in bands_of(height, width):
        if band.kind != LOW:
            values = QualityMap(cells).of_band(band.level, band.kind, band.height, band.width)
            size = band.height, band.width
            expected = [reference.values_of_band(one, band.level, band.kind, size) for one in cells]
            np.testing.assert_array_equal(values, expected)


def roundtrip(coefficients, code, cells):
    left, quality_map = coefficients.copy(), None if cells is None else QualityMap(cells)
    stream, _, _ = encode_planes(left, code, quality_map, keep=True)
    decoded = decode_planes(stream, coefficients.shape, code, quality_map=quality_map)
    np.testing.assert_array_equal(decoded, left, "the encoder left other coefficients than decoding gives")
    return stream, decoded


@settings(deadline=None, max_examples=60)
@given(any_cells((2, 3, 3)), st.sampled_from([0, 100, step_code(1), step_code(300), STEPS - 1]), st.data())
def test_second_decoder_agrees(cells, code, data):
    height, width = data.draw(st.integers(33, 45)), data.draw(st.integers(33, 45))
    coefficients = to_coefficients(planes((2, 2, height, width), data.draw(st.sampled_from([1, 40, 9000]))) << 4)
    stream, decoded = roundtrip(coefficients, max(code, step_code(1 / 16)), cells)
    decoder = reference.WaveletDecoder(stream, max(code, step_code(1 / 16)), 4, 2, cells.astype(int))
    found = decoder.decode(height, width).reshape(2, 2, height, width)
    np.testing.assert_array_equal(found, to_components(decoded))


def test_each_cell_has_the_error_of_its_step():
    """Value n is the step of a code 32 (n - 1) above; neighbours of finer steps are not worse for it."""
    code, shape = step_code(2), (1, 1, 256, 256)
    coefficients = to_coefficients(planes(shape, 100) << 4)
    original = to_components(coefficients.copy())
    cells = np.full((1, 16, 16), 25, np.uint8)
    cells[:, 4:12, 4:12] = 1

    def error(decoded, part):
        return np.sqrt(np.square(to_components(decoded.copy()).astype("f8") - original)[(0, 0, *part)].mean())

    stream, mixed = roundtrip(coefficients, code, cells)
    fine_stream, fine = roundtrip(coefficients, code, None)
    coarse_stream, coarse = roundtrip(coefficients, code + 24 * 32, None)
    inside, outside = np.s_[64:192, 64:192], np.s_[:40, :]
    assert error(mixed, inside) < 1.03 * error(fine, inside)
    assert error(mixed, outside) < 1.02 * error(coarse, outside)
    sides = np.s_[64:72, 64:192], np.s_[184:192, 64:192], np.s_[64:192, 64:72], np.s_[64:192, 184:192]
    losses = [error(mixed, side) / error(fine, side) for side in sides]
    assert np.mean(losses) < 1.06  # 0.5 dB
    share = 0.25
    assert len(stream) < 1.1 * (share * len(fine_stream) + (1 - share) * len(coarse_stream))


def test_no_care_costs_nothing():
    coefficients = to_coefficients(planes((1, 1, 256, 256), 100) << 4)
    code, cells = step_code(1), np.zeros((1, 16, 16), np.uint8)
    stream, _ = roundtrip(coefficients, code, cells)
    assert len(stream) < 100  # the low band
    cells[:, :, 8:] = 1
    half, _ = roundtrip(coefficients, code, cells)
    assert len(half) < 0.54 * len(roundtrip(coefficients, code, None)[0])


def header(slices=1):
    return h.read_header(crafted.write(axes=b"\x14\x02", shape=(slices, 70, 90), grid=(5, 6), sections=[]))


WRONG = {
    "empty": (b"", CorruptPayload, "empty"),
    "layout 1": (b"\1", UnsupportedPayload, "unknown layout 1|upgrade"),
    "a zero byte at the end": (b"\0\5\0", CorruptPayload, "zero byte"),
    "bytes left over": (encode_quality_map(QualityMap(np.ones((1, 5, 6), np.uint8))) + b"\xaa" * 200, CorruptPayload,
                        "left over"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_crafted_sections(name):
    data, error, words = WRONG[name]
    payload = crafted.write(axes=b"\x14\x02", shape=(1, 70, 90), grid=(5, 6), sections=[(6, data)])
    check_rejects(error, f"quality map|{words}", h.unpack(payload).read, QUALITY_MAP)
    with pytest.raises(reference.Damaged if error is CorruptPayload else reference.Unsupported):
        reference.read_cells(data, (1, 70, 90))


@settings(deadline=None)
@given(st.binary(max_size=80), st.integers(1, 3))
def test_any_bytes_are_cells_or_refused_as_by_the_second_decoder(data, slices):
    try:
        wanted = reference.read_cells(b"\0" + data, (slices, 70, 90)).tolist()
    except reference.Damaged:
        with pytest.raises(CorruptPayload):
            QUALITY_MAP.decode(b"\0" + data, header(slices))
    else:
        assert QUALITY_MAP.decode(b"\0" + data, header(slices)).cells.tolist() == wanted


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=60), any_cells((1, 1, 2)))
def test_second_decoder_agrees_on_any_bytes(data, cells):
    shape, code = (1, 2, 14, 17), step_code(1)
    try:
        decoder = reference.WaveletDecoder(data, code, 2, 2, cells.astype(int))
        wanted = decoder.decode(*shape[2:]).reshape(shape)
    except reference.Damaged:
        with pytest.raises(CorruptPayload):
            decode_planes(data, shape, code, quality_map=QualityMap(cells))
    else:
        found = decode_planes(data, shape, code, quality_map=QualityMap(cells))
        np.testing.assert_array_equal(to_components(found), wanted)
