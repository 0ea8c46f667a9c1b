"""What samples of a chunk are: found where it saves bytes, and exact in all modes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import DeepSIC
from deepsic_codec.codec.decode import compute_labels, parse_payload
from deepsic_codec.codec.structure import find_grids, find_levels, find_padding
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload import header as h
from deepsic_codec.payload.sections import FEATURES, LABELS, NODATA, RESIDUAL, STRUCTURE, WAVELET
from deepsic_codec.payload.structure import Grid, Structure, encode_structure
from tests.common import check_rejects, check_roundtrip, photograph
from tests.payload.crafted import write

pytestmark = pytest.mark.usefixtures("stub")
LOSSLESS = DeepSIC(max_error=0, semantics="none")


def scene(bands=3, seed=0, size=64):
    return photograph(size, size, bands, seed=seed)


def structure_of(payload):
    return h.unpack(payload).read(STRUCTURE)


def spread(samples, levels, seed=0):
    """Samples of 8 bits as indices of levels of 16 bits at random."""
    return np.sort(np.random.default_rng(seed).permutation(60000)[:levels]).astype("u2")[samples.astype(int) % levels]


# What is stored in a dtype that could hold more, and how much more it may take.
VARIANTS = {
    "shifted": (lambda s: s.astype("u2") << 4, 1.003),
    "every fifth": (lambda s: s.astype("u2") * 5 + 3, 1.003),
    "signed": (lambda s: (s.astype("i4") * 100 - 20000).astype("i2"), 1.003),
    "another divisor in each band": (lambda s: s.astype("u2") * np.array([7, 1, 256], "u2"), 1.003),
    "few levels": (lambda s: spread(s, 256), 1.09),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_lossless_bytes_are_those_of_the_plain_scene(name):
    change, ratio = VARIANTS[name]
    plain = scene(size=128)
    samples = change(plain)
    payload = check_roundtrip(LOSSLESS, samples)
    np.testing.assert_array_equal(LOSSLESS.decode(payload), samples)
    assert len(payload) < ratio * len(LOSSLESS.encode(plain)) + 25


@pytest.mark.parametrize("samples", [scene(), scene().astype("u2") * 100 + scene(seed=1), scene().astype("f4") * 16])
@pytest.mark.parametrize("parameters", [{"max_error": 0.5}, {"max_error": 3}, {"quality": 90, "transform": "wavelet"}])
def test_plain_samples_have_no_section(samples, parameters):
    samples = np.concatenate([samples, samples[..., :1] // 2], axis=-1)
    codec = DeepSIC(value_range="chunk", semantics="none", **parameters)
    assert h.read_header(codec.encode(samples)).entry(STRUCTURE.kind) is None


def test_values_missing_by_chance_are_no_levels():
    """Noise of 14 bits: most values do not occur, and a table of those that do would save nothing."""
    samples = np.random.default_rng(0).integers(0, 1 << 14, (1, 96, 96, 1)).astype("u2")
    assert find_levels(samples, None, 0) is None


def test_constant_bands_have_no_divisor():
    samples = np.full((1, 64, 64, 2), 4096, "u2")
    assert find_levels(samples, None, 0) is None
    samples[..., 1] = scene(1)[None, ..., 0].astype("u2") * 16
    first, second = find_levels(samples, None, 0)
    assert (first.divisor, second.divisor) == (1, 16)


@pytest.mark.parametrize(
    ("bound", "divisor"), [(0, 16), (7, 16), (8, 1), (15, 1), (16, 16), (23, 16), (24, 1), (33, 16)]
)
def test_steps_within_a_bound_are_as_wide_as_without_a_divisor(bound, divisor):
    samples = scene(2)[None].astype("u2") * 16
    structure = find_levels(samples, None, bound)
    assert (1 if structure is None else structure[1].divisor) == divisor
    codec = DeepSIC(max_error=bound, semantics="none")
    payload = codec.encode(samples[0])
    assert np.abs(codec.decode(payload).astype(int) - samples[0]).max() <= bound
    assert (structure_of(payload) is None) == (structure is None)


@given(
    st.sampled_from(["u1", "i1", "<u2", ">i2"]),
    st.integers(1, 40),
    st.sampled_from([0, 1, 2, 5, 20]),
    st.sampled_from(["lattice", "table"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_errors_are_bounded_and_nodata_is_kept(dtype, divisor, bound, kind, masked, seed):
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    values = np.arange(info.min + seed % divisor, info.max + 1, divisor)
    if kind == "table":
        values = np.sort(rng.permutation(values)[: 1 + len(values) // 4])
    picture = photograph(24, 30, 2, seed=seed).astype(int)
    samples = values[picture * len(values) // 256].astype(dtype)
    nodata = int(samples[3, 3, 0]) if masked else None
    if masked:
        samples[:10, :12] = nodata
        samples[..., 1] = np.where(seed % 2, nodata, samples[..., 1])  # a band without data
    codec = DeepSIC(max_error=bound, nodata=nodata, semantics="none")
    decoded = codec.decode(codec.encode(samples))
    assert decoded.dtype == samples.dtype and np.abs(decoded.astype(int) - samples).max() <= bound
    if masked:
        np.testing.assert_array_equal(decoded == nodata, samples == nodata)


def test_samples_of_a_wavelet_become_levels_where_errors_are_small():
    samples = scene().astype("u2") << 8
    for quality, exact in ((200, True), (60, False)):
        codec = DeepSIC(quality=quality, transform="wavelet", semantics="none", value_range="chunk")
        payload = check_roundtrip(codec, samples, -np.inf)
        decoded = codec.decode(payload)
        assert (structure_of(payload) is not None) == exact
        assert np.array_equal(decoded, samples) == exact


def test_a_target_counts_errors_to_the_nearest_levels():
    samples = scene(1, size=128).astype("u2") * 256
    codec = DeepSIC(rmse=40, transform="wavelet", semantics="none", value_range="chunk")
    payload = codec.encode(samples)
    error = np.sqrt(np.square(codec.decode(payload).astype(float) - samples).mean())
    assert structure_of(payload) is not None and error < 50
    assert len(payload) <= len(DeepSIC(max_error=0, semantics="none").encode(samples)), "exact samples take less"


def circle(samples, value):
    height, width = samples.shape[:2]
    y, x = np.ogrid[:height, :width]
    outside = (y - height / 2) ** 2 + (x - width / 2) ** 2 > (0.45 * min(height, width)) ** 2
    return np.where(outside[(...,) + (None,) * (samples.ndim - 2)], samples.dtype.type(value), samples), outside


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2"])
@pytest.mark.parametrize("high", [False, True])
def test_lossless_padding_takes_the_bytes_of_nodata(dtype, high):
    value = np.iinfo(dtype).max if high else np.iinfo(dtype).min
    samples, _ = circle(scene(2, size=128).astype(dtype), value)
    samples[60, 60] = value  # inside, too
    payload = check_roundtrip(LOSSLESS, samples)
    np.testing.assert_array_equal(LOSSLESS.decode(payload), samples)
    assert structure_of(payload).padding
    declared = DeepSIC(max_error=0, semantics="none", nodata=int(value)).encode(samples)
    assert abs(len(payload) - len(declared)) < 8 and h.unpack(declared).read(STRUCTURE) is None


@pytest.mark.parametrize("dtype", ["u2", "f4"])
@pytest.mark.parametrize("parameters", [{"quality": 60}, {"bpp": 4}, {"psnr": 45}, {"max_error": 10}, {"bpp": 10}])
def test_padding_is_exact_where_data_is_not(dtype, parameters):
    samples, outside = circle((scene(2, size=96).astype("u2") * 100 + scene(2, 1, 96)).astype(dtype), 0)
    codec = DeepSIC(transform="wavelet", value_range="chunk", semantics="none", **parameters)
    payload = check_roundtrip(codec, samples, -np.inf)
    decoded = codec.decode(payload)
    assert structure_of(payload).padding and (decoded[outside] == 0).all() and not np.array_equal(decoded, samples)
    if "psnr" in parameters:
        # Of data: its errors would else grow with the padding.
        difference = (decoded.astype(float) - samples)[~outside]
        error = np.square(difference / np.ptp(samples)).mean()
        assert abs(-10 * np.log10(error) - 45) < 0.5


@pytest.mark.parametrize("samples", [scene(), np.minimum(scene(size=96), 128), np.full((64, 64, 3), 7, "u1")])
def test_areas_without_steps_at_their_edges_are_no_padding(samples):
    assert find_padding(samples[None], 0) is None


def test_padding_beside_nodata_is_refused():
    samples, _ = circle(scene(1), 0)
    unpacked = h.unpack(DeepSIC(max_error=0, semantics="none").encode(samples))
    sections = dict(unpacked.sections) | {NODATA.kind: b"\0\0"}
    crafted = write(shape=(64, 64, 1), grid=(4, 4), decoder=unpacked.header.decoder, sections=sorted(sections.items()))
    check_rejects(CorruptPayload, "nodata section and a structure section", DeepSIC().decode, crafted)


def test_a_structure_of_features_is_refused():
    payload = DeepSIC(semantics="none").encode(scene())
    unpacked = h.unpack(payload)
    crafted = write(
        shape=(64, 64, 3),
        grid=(4, 4),
        decoder=unpacked.header.decoder,
        sections=[(FEATURES.kind, unpacked.sections[FEATURES.kind]), (STRUCTURE.kind, b"\1\2\0\0")],
    )
    check_rejects(CorruptPayload, "structure section without a wavelet", DeepSIC().decode, crafted)


def repeated(factors, height=70, width=90, dtype="u2", y=0, x=0):
    """Bands of which each pixel is repeated, and cut off at the top and on the left."""
    bands = []
    for seed, factor in enumerate(factors):
        small = photograph(height // factor + 6, width // factor + 6, seed=seed).astype(dtype) * 3 + seed
        bands.append(small.repeat(factor, 0).repeat(factor, 1)[y : y + height, x : x + width])
    return np.ascontiguousarray(np.stack(bands, axis=-1))


@pytest.mark.parametrize(("y", "x"), [(0, 0), (1, 0), (5, 3)])
@pytest.mark.parametrize("axes", ["yxc", "cyx", "tyxc"])
def test_repeated_bands_are_coded_on_their_grids(axes, y, x):
    samples = repeated([1, 2, 6, 2, 1], y=y, x=x)
    grids = find_grids(samples[None])
    assert [(g.bands, g.factor) for g in grids] == [((0, 4), 1), ((1, 3), 2), ((2,), 6)]
    assert all(g.phase == (y % g.factor, x % g.factor) for g in grids)
    order = [("yxc".index(axis) if axis != "t" else None) for axis in axes]
    array = samples.transpose([i for i in order if i is not None])
    array = np.stack([array, array]) if "t" in axes else array
    codec = DeepSIC(axes=axes, max_error=0, semantics="none")
    payload = check_roundtrip(codec, array)
    np.testing.assert_array_equal(codec.decode(payload), array)
    apart = sum(len(DeepSIC(max_error=0, semantics="none").encode(g.thinned(samples[None])[0])) for g in grids)
    if "t" not in axes:
        assert len(payload) < apart


@pytest.mark.parametrize("parameters", [{"quality": 90}, {"bpp": 4}, {"psnr": 45}, {"rmse": 5}, {"max_error": 4}])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("nodata", [None, 7])
def test_repeated_bands_within_errors(dtype, parameters, nodata):
    samples = repeated([1, 2, 3], dtype=dtype, y=1)
    if nodata is not None:
        samples[:17, :30] = nodata  # whole pixels of each grid
    codec = DeepSIC(transform="wavelet", value_range="chunk", semantics="none", nodata=nodata, **parameters)
    payload = check_roundtrip(codec, samples, -np.inf)
    decoded = codec.decode(payload)
    difference = decoded.astype(float) - samples
    assert structure_of(payload).grids
    if nodata is not None:
        np.testing.assert_array_equal(decoded == nodata, samples == nodata)
    if "max_error" in parameters:
        assert np.abs(difference).max() <= 4
    elif "rmse" in parameters:
        data = samples != nodata if nodata is not None else np.ones(samples.shape, bool)
        assert 4 < np.sqrt(np.square(difference[data]).mean()) < 6
    elif "bpp" in parameters:
        assert abs(8 * len(payload) / samples[..., 0].size - 4) < 0.15
    again = DeepSIC(transform="wavelet", value_range="chunk", semantics="none", nodata=nodata, **parameters)
    assert again.encode(samples) == payload


@pytest.mark.parametrize("factor", [8, 9, 12, 16, 25])
@pytest.mark.parametrize("max_error", [0, 1])
def test_pixels_that_are_repeated_more_often_than_a_grid_can_say(factor, max_error):
    """The samples of the grid are repeated, too, and a grid has no grids."""
    rng = np.random.default_rng(0)
    samples = np.kron(rng.integers(0, 5, (8, 9)), np.ones((factor, factor), "u1")).astype("u1")
    codec = DeepSIC(max_error=max_error, axes="yx")
    payload = codec.encode(samples)
    assert structure_of(payload).grids
    assert np.abs(codec.decode(payload).astype(int) - samples).max() <= max_error


@pytest.mark.parametrize("bits", [4, 9])
def test_samples_of_grids_are_coded_in_steps_at_high_rates(bits):
    walk = np.random.default_rng(0).normal(0, 8, (128, 128, 2)).cumsum(axis=0).cumsum(axis=1) / 4 + 20000
    walk[..., 1] = walk[::2, ::2, 1].repeat(2, 0).repeat(2, 1)
    samples = walk.astype("u2")
    codec = DeepSIC(bpp=bits, transform="wavelet", semantics="none", value_range="chunk")
    payload = codec.encode(samples)
    assert [set(grid.sections) for grid in structure_of(payload).grids] == [{RESIDUAL.kind}] * 2
    assert 8 * len(payload) <= 1.03 * bits * 128**2
    difference = codec.decode(payload).astype(int) - samples
    assert not difference[..., 1].any() and np.abs(difference).max() == (1 if bits == 4 else 0)


def test_errors_of_repeated_bands_are_alike():
    """A step that suits one resolution suits the others: fewer bytes at as small an error as without grids."""
    samples = repeated([1, 2], 128, 128)
    codec = DeepSIC(rmse=3, transform="wavelet", semantics="none", value_range="chunk")
    shifted = samples.copy()
    shifted[::7, ::5, 1] ^= 1  # no repetition any more
    assert structure_of(codec.encode(shifted)) is None
    assert len(codec.encode(samples)) < 0.8 * len(codec.encode(shifted))


@pytest.mark.parametrize("samples", [scene(), np.full((64, 64, 2), 5, "u1"), repeated([7, 1]), repeated([2])[:15]])
def test_other_bands_have_one_grid(samples):
    assert find_grids(samples[None]) == ()


def test_labels_of_repeated_bands():
    samples = repeated([1, 2, 2], 128, 128, "u1")
    codec = DeepSIC(transform="wavelet", quality=95)
    payload = codec.encode(samples)
    assert structure_of(payload).grids and h.read_section(payload, h.read_header(payload), LABELS) is not None
    post = DeepSIC(transform="wavelet", quality=95, semantics="post").encode(samples)
    assert compute_labels(parse_payload(post)) is not None


def crafted(change, nodata=None):
    """A payload whose grids are changed."""
    payload = DeepSIC(max_error=0, semantics="none").encode(repeated([1, 2], 64, 64))
    unpacked = h.unpack(payload)
    grids = [g.__class__(g.bands, g.factor, g.phase, dict(g.sections)) for g in unpacked.read(STRUCTURE).grids]
    sections = dict(unpacked.sections) | {STRUCTURE.kind: None}
    change(grids, sections)
    sections[STRUCTURE.kind] = encode_structure(Structure(None, grids=tuple(grids)))
    decoder = unpacked.header.decoder
    return write(dtype=3, shape=(64, 64, 2), grid=(4, 4), decoder=decoder, sections=sorted(sections.items()))


NESTED = Grid((0,), 1, (0, 0), {RESIDUAL.kind: b""})
GRIDS = {
    "no samples": (lambda grids, sections: grids[0].sections.clear(), "features section is missing"),
    "labels": (lambda grids, sections: grids[0].sections.update({0x81: b""}), "sections of kinds"),
    "nodata": (lambda grids, sections: grids[1].sections.update({NODATA.kind: b"\0\0\1"}), "sections of kinds"),
    "both": (
        lambda grids, sections: grids[1].sections.update({WAVELET.kind: b"\0\0\0"}),
        "both a wavelet section and a residual",
    ),
    "grids": (
        lambda grids, sections: grids.__setitem__(
            1, Grid((1,), 2, (0, 0), {STRUCTURE.kind: encode_structure(Structure(None, grids=(NESTED,)))})
        ),
        "a grid with grids",
    ),
    "beside a residual": (
        lambda grids, sections: sections.update({RESIDUAL.kind: b"\0\1"}),
        "structure section with grids",
    ),
    "another factor": (lambda grids, sections: grids.__setitem__(1, replace(grids[1], factor=3)), "residual section"),
    "cut off": (
        lambda grids, sections: grids[1].sections.update({RESIDUAL.kind: grids[1].sections[RESIDUAL.kind][:-9]}),
        "residual section",
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_crafted_grids_are_refused(name):
    change, words = GRIDS[name]
    assert DeepSIC().decode(crafted(lambda grids, sections: None)).shape == (64, 64, 2)
    check_rejects(CorruptPayload, words, DeepSIC().decode, crafted(change))
