"""Chunks at reduced sizes: near the means of pixels, from as many bytes as they need, whatever they are coded as."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec import DeepSIC
from deepsic_codec.codec.reduced import SCALES, needed_length, parse_start
from deepsic_codec.errors import ConfigurationError, CorruptPayload, DeepSICError
from deepsic_codec.payload.header import pack, read_header, unpack
from deepsic_codec.payload.sections import STRUCTURE, WAVELET, Section
from deepsic_codec.payload.structure import table_length
from tests.common import check_rejects, photograph

pytestmark = pytest.mark.usefixtures("stub")

WAVELETS = {"transform": "wavelet", "semantics": "none"}
FUTURE = Section(99, "later", False, bytes, None)
SCENE = {"u1": 1, "<u2": 40, "<i2": 40, "<f4": 0.01}


def scene(dtype, *shape):
    return (photograph(*shape).astype("f8") * SCENE[dtype]).astype(dtype)


def means(array, scale, valid=None, back=0):
    """Means of blocks of an array (y, x, bands) over what is valid, moved back some pixels; NaN where nothing is."""
    height, width, bands = array.shape
    rows, columns = -(-height // scale), -(-width // scale)
    padded = np.zeros((2, (rows + 1) * scale, (columns + 1) * scale, bands))  # values, and whether they count
    inside = padded[:, back : back + height, back : back + width]
    inside[1] = True if valid is None else valid
    inside[0] = np.where(inside[1], array, 0)
    blocks = padded[:, : rows * scale, : columns * scale].reshape(2, rows, scale, columns, scale, bands)
    total, count = blocks.sum(axis=(2, 4))
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


@pytest.mark.parametrize("dtype", SCENE)
@pytest.mark.parametrize("scale", SCALES)
def test_wavelets_are_near_the_means_of_blocks(dtype, scale):
    array = scene(dtype, 150, 203, 4)
    codec = DeepSIC(**WAVELETS, rmse=2 * SCENE[dtype])
    payload = codec.encode(array)
    found = codec.decode_preview(payload, scale)
    wanted = means(codec.decode(payload).astype("f8"), scale, back=scale // 2)  # samples lie at first pixels of blocks
    assert found.dtype == array.dtype and found.shape == wanted.shape
    error = np.sqrt(np.square(found - wanted)[1:-1, 1:-1].mean()) / SCENE[dtype]
    assert error <= (1e-4 if scale == 1 else 4), error  # the wavelet is smoother than a mean


@pytest.mark.parametrize("codec", [DeepSIC(max_error=2), DeepSIC(quality=40, transform="features")], ids=repr)
def test_other_chunks_are_averaged(codec):
    payload = codec.encode(photograph(70, 81, 3))
    decoded = codec.decode(payload)
    for scale in SCALES:
        np.testing.assert_array_equal(codec.decode_preview(payload, scale), np.rint(means(decoded, scale)))


@pytest.mark.parametrize("options", [WAVELETS | {"rmse": 1}, {"max_error": 1}], ids=str)
def test_no_data(options):
    """A hole stays one where a block has nothing else, and has no part in the means of others."""
    array = scene("<u2", 96, 96, 2)
    array[20:70, 30:90] = 0
    codec = DeepSIC(**options, nodata=0)
    payload = codec.encode(array)
    decoded = codec.decode(payload).astype("f8")
    for scale in (1, 8):
        wanted = means(decoded, scale, decoded != 0)
        found = codec.decode_preview(payload, scale)
        np.testing.assert_array_equal(found == 0, np.isnan(wanted))
        assert np.nanmax(np.abs(found - wanted)[found != 0]) < 2000


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 40, 2), (13, 13, 1), (16, 300, 1)])
def test_small_chunks(shape):
    array = scene("<u2", *shape)
    codec = DeepSIC(**WAVELETS, rmse=20)
    payload = codec.encode(array)
    for scale in SCALES:
        assert codec.decode_preview(payload, scale).shape == (-(-shape[0] // scale), -(-shape[1] // scale), shape[2])


@cache
def large():
    """A payload with checkpoints."""
    array = scene("<u2", 256, 256, 2) + np.random.default_rng(0).integers(0, 900, (256, 256, 2)).astype("u2")
    return array, DeepSIC(**WAVELETS, rmse=30).encode(array)


def gridded(phase=0):
    """Samples of which bands 1 and 2 are pixels that are repeated twice and six times, from a phase on."""
    array = scene("<u2", 240, 276, 4) + np.random.default_rng(0).integers(0, 900, (240, 276, 4)).astype("u2")
    for band, factor in ((1, 2), (2, 6)):
        rows, columns = (np.maximum((np.arange(n) + phase) // factor * factor - phase, 0) for n in array.shape[:2])
        array[..., band] = array[rows[:, None], columns, band]
    return array


@cache
def gridded_payload():
    return DeepSIC(**WAVELETS, rmse=30).encode(gridded())


@pytest.mark.parametrize("phase", [0, 1])
def test_bands_of_several_resolutions_have_starts_together(phase):
    array, codec = gridded(phase), DeepSIC(**WAVELETS, rmse=30)
    payload = codec.encode(array)
    header, decoded = read_header(payload), codec.decode(payload).astype("f8")
    assert [grid.factor for grid in unpack(payload).read(STRUCTURE).grids] == [1, 2, 6]
    lengths = [needed_length(payload, header, scale) for scale in SCALES]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[1] < 0.45 * len(payload) and lengths[3] < 0.1 * len(payload)  # the whole coarsest band
    for scale, length in zip(SCALES, lengths, strict=True):
        found = codec.decode_preview(payload, scale)
        np.testing.assert_array_equal(codec.decode_preview(payload[:length], scale), found)
        check_rejects(CorruptPayload, "bytes", parse_start, payload[: length - 1], scale)
        near = [means(decoded, scale, back=back)[1:-1, 1:-1] for back in (0, scale // 2)]
        for band in range(4):
            error = min(np.sqrt(np.square(found[1:-1, 1:-1] - one)[..., band].mean()) for one in near)
            assert error < (0.4 if band == 2 else 0.15) * near[0][..., band].std(), (band, scale)  # 6 divides no scale


def test_such_a_picture_gets_better_with_every_byte():
    payload, codec = gridded_payload(), DeepSIC()
    whole, header = codec.decode(payload).astype(int), read_header(payload)
    first, errors = needed_length(payload, header, 16), []
    check_rejects(CorruptPayload, f"needs {first} of", codec.decode_preview, payload[: first - 1], 1)
    for size in range(first, len(payload) + 1, 2999):
        assert first <= needed_length(payload, header, 1, size) <= size
        errors.append(np.square(codec.decode_preview(payload[:size], 1) - whole).mean())
    assert errors == sorted(errors, reverse=True) and len(set(errors)) > 15 and errors[-1] < 0.05 * errors[0]
    lengths = [needed_length(payload, header, 1, groups=n) for n in range(1, 7)]
    assert lengths == [needed_length(payload, header, scale) for scale in (16, 8, 4, 2, 1, 1)]


def test_whole_bands_in_a_start_are_verified():
    """Those of the coarsest grid, which has no checksums within its wavelet."""
    payload = gridded_payload()
    header = read_header(payload)
    section, length = header.entry(STRUCTURE.kind), needed_length(payload, header, 16)
    end = section.offset + table_length(payload[section.offset :], header, section.length)
    sizes = [len(grid.sections[WAVELET.kind]) for grid in unpack(payload).read(STRUCTURE).grids]
    assert sizes[2] < length - end < sizes[0]
    for place in (length - sizes[2], length - 9):  # the last grid has the last piece
        damaged = payload[:place] + bytes((payload[place] ^ 4,)) + payload[place + 1 : length]
        check_rejects(CorruptPayload, "checksum of a section of a grid", parse_start, damaged, 16)


def test_residuals_of_several_resolutions_are_averaged():
    array = gridded()[:96, :96]
    codec = DeepSIC(max_error=0)
    payload = codec.encode(array)
    assert unpack(payload).read(STRUCTURE).grids
    header = read_header(payload)
    assert needed_length(payload, header, 8) == len(payload)
    np.testing.assert_array_equal(codec.decode_preview(payload, 4)[..., 0], np.rint(means(array, 4))[..., 0])
    np.testing.assert_array_equal(codec.decode_preview(payload, 2)[..., 1], array[::2, ::2, 1])


def test_no_data_of_several_resolutions():
    array = gridded()
    array[48:144, 96:216] = 0
    codec = DeepSIC(**WAVELETS, rmse=30, nodata=0)
    payload = codec.encode(array)
    assert unpack(payload).read(STRUCTURE).grids
    length = needed_length(payload, read_header(payload), 8)
    assert length < 0.25 * len(payload)
    found = codec.decode_preview(payload[:length], 8)
    assert (found[6:18, 12:27] == 0).all() and (np.delete(found, np.s_[6:18], 0) != 0).all()


def test_a_start_before_another_section_is_whole():
    """That of all samples, where embeddings or the like follow."""
    for payload in (large()[1], gridded_payload()):
        unpacked = unpack(payload)
        sections = {Section(n, "", True, bytes, None): data for n, data in unpacked.sections.items()}
        sections[FUTURE], header = b"12345", unpacked.header
        names = "dtype", "shape", "order", "axes", "decoder", "head", "quality", "grid", "grouping"
        longer = pack(**{name: getattr(header, name) for name in names}, sections=sections)
        codec = DeepSIC()
        np.testing.assert_array_equal(codec.decode(longer), codec.decode(payload))
        for cut in (1, 5):
            np.testing.assert_array_equal(codec.decode_preview(longer[:-cut], 1), codec.decode(payload))


def test_a_reduced_size_needs_a_part_of_the_bytes():
    _, payload = large()
    codec, header = DeepSIC(), read_header(payload)
    lengths = [needed_length(payload, header, scale) for scale in SCALES]
    assert lengths[0] == len(payload) and lengths == sorted(lengths, reverse=True)
    assert lengths[1] < 0.4 * len(payload) and lengths[3] < 0.05 * len(payload)
    for scale, length in zip(SCALES, lengths, strict=True):
        whole = codec.decode_preview(payload, scale)
        np.testing.assert_array_equal(codec.decode_preview(payload[:length], scale), whole)
        check_rejects(CorruptPayload, "bytes", parse_start, payload[: length - 1], scale)
        with pytest.raises(CorruptPayload):
            codec.decode(payload[: min(length, len(payload) - 1)])


def test_a_picture_gets_better_with_every_byte():
    """As far as the bytes can be verified: at full size and at a reduced one."""
    array, payload = large()
    codec, header = DeepSIC(), read_header(payload)
    first = needed_length(payload, header, 16)
    check_rejects(CorruptPayload, f"bytes|needs {first} of", codec.decode_preview, payload[: first - 1], 1)
    for scale in (1, 2):
        whole = codec.decode_preview(payload, scale).astype(int)
        ends, errors = [], []
        for size in range(first, len(payload) + 1, 1999):
            found = codec.decode_preview(payload[:size], scale)
            assert found.shape == whole.shape and found.dtype == array.dtype
            ends.append(needed_length(payload, header, scale, size))
            assert ends[-1] <= size
            np.testing.assert_array_equal(found, codec.decode_preview(payload[: ends[-1]], scale))
            errors.append(np.square(found - whole).mean())
        assert len(set(ends)) == len(set(errors)) >= 10 // scale
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3 * errors[0]
    assert errors[-1] == 0  # of a half, before the end
    features = DeepSIC(quality=40, transform="features").encode(photograph(70, 81, 3))
    check_rejects(CorruptPayload, f"needs {len(features)} of", codec.decode_preview, features[:-1], 8)


def test_levels_and_padding_are_in_front_of_the_wavelet():
    """So that the start of such a chunk is enough; a block of nothing but padding is padding."""
    array = large()[0] // 16 * 16 + 16
    array[:, :100] = 0
    codec = DeepSIC(**WAVELETS, rmse=3, effort=0)
    payload = codec.encode(array)
    structure = unpack(payload).read(STRUCTURE)
    assert structure.levels and structure.padding
    length = needed_length(payload, read_header(payload), 8)
    assert length < 0.06 * len(payload)
    found = codec.decode_preview(payload[:length], 8)
    np.testing.assert_array_equal(found, codec.decode_preview(payload, 8))
    assert (found[:, :12] == 0).all() and (found[:, 13:] != 0).all()
    assert np.abs(found[:, 14:] - means(array, 8, back=4)[:, 14:])[1:-1, :-1].mean() < 300


def test_how_much_to_read_is_told_step_by_step():
    """From any start that has the header."""
    _, payload = large()
    header = read_header(payload)
    wanted = needed_length(payload, header, 8)
    size = header.size
    for _ in range(3):
        size = max(size, needed_length(payload[:size], header, 8))
    assert size == wanted


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_starts_are_refused(data):
    """One bit of what is read, or its end."""
    payload = data.draw(st.sampled_from([large()[1], gridded_payload()]))
    codec, length = DeepSIC(), needed_length(payload, read_header(payload), 8)
    damaged = bytearray(payload[:length])
    place = data.draw(st.integers(0, 8 * length - 1))
    damaged[place // 8] ^= 1 << place % 8
    try:
        found = codec.decode_preview(bytes(damaged), 8)
    except DeepSICError:
        return
    np.testing.assert_array_equal(found, codec.decode_preview(payload, 8))  # the checksum of another start


@pytest.mark.parametrize("scale", [0, 3, 32, -8, True, "8", None])
def test_other_scales_are_refused(scale):
    codec = DeepSIC()
    check_rejects(
        ConfigurationError, "scale|1, 2, 4, 8, 16", codec.decode_preview, codec.encode(photograph(9, 9, 3)), scale
    )
