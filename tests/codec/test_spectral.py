"""The spectral transform: exact sums, the same matrix everywhere, components that turn back into bands."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec import DeepSIC
from deepsic_codec.codec import spectral
from deepsic_codec.codec.decode import parse_payload
from deepsic_codec.codec.wavelet import _restored, components_of
from deepsic_codec.errors import ConfigurationError, CorruptPayload
from deepsic_codec.payload import header as h
from deepsic_codec.payload.sections import FEATURES, SPECTRAL, WAVELET
from deepsic_codec.payload.spectral import MAX_DEVIATION, UNIT, deviation
from deepsic_codec.payload.steps import FRACTION_BITS
from deepsic_codec.reference import bands_of_components
from tests.common import check_rejects, photograph

MOST = spectral.MAX_COMPONENT


def alike(height, width, bands, seed=0, depth=65535, slices=1):
    """Bands that mix the same three images, int32 (slices, height, width, bands) from 0 to `depth`."""
    rng = np.random.default_rng(seed)
    sources = np.stack([photograph(height, width, 3, seed=seed + i) for i in range(slices)]).astype("f8")
    mixed = sources @ rng.uniform(0.1, 1, (3, bands)) + rng.normal(0, 0.1, (slices, height, width, bands))
    low, high = mixed.min(axis=(0, 1, 2)), mixed.max(axis=(0, 1, 2))
    return np.rint((mixed - low) / np.maximum(high - low, 1) * depth).astype("i4")


def unlike(height, width, bands, depth=65535, seed=0):
    """Bands of noise."""
    return np.random.default_rng(seed).integers(0, depth, (1, height, width, bands), "i4", endpoint=True)


def fit(values, mask=None):
    """The matrix that is fitted to the differences of neighbours."""
    return spectral._principal_axes(spectral._difference_products(values, mask)[0])


def orthonormal(bands, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(bands, bands)))[0]


sizes = st.integers(1, 20)


@settings(deadline=None)
@given(sizes, sizes, sizes, st.integers(0, 99), st.sampled_from([1, 255, 65535, 1 << 20]), st.booleans())
def test_components_turn_back_into_values(height, width, bands, seed, depth, same):
    values = alike(height, width, bands, seed, depth, 2) if same else unlike(height, width, bands, depth, seed)
    matrix = fit(values)
    assert matrix.dtype == np.int16 and matrix.shape == (bands, bands) and deviation(matrix) < 1e-3
    assert (matrix.sum(axis=1, dtype="i8") >= 0).all()
    components = spectral.forward(values, matrix)
    back = spectral.inverse(components, matrix)
    assert back.dtype == components.dtype == np.int32 and back.shape == values.shape
    error = (back - values).astype("f8")
    # Components are off by a half at most, and rows of the transposed matrix have a length of 1.
    assert np.abs(error).max() <= (bands**0.5 + 1) / 2 + depth / (1 << 17)
    if depth <= 65535:
        assert (np.abs(error) > 1).mean() <= 0.01 and np.square(error).sum() < 0.5 * error.size + 9


@given(st.integers(1, 256), st.integers(1, 256), st.integers(0, 99))
def test_refined_rows_are_orthonormal(bands, components, seed):
    matrix = spectral.fixed_point(orthonormal(bands, seed)[:components])
    rows = spectral.refined(matrix) / 2.0**spectral.PRECISE_BITS
    rounding = np.sqrt(bands) / 2 / 2**spectral.PRECISE_BITS  # largest norm of what rounding moves a row by
    assert np.abs(rows @ rows.T - np.eye(len(rows))).max() < 2 * rounding + 3e-6
    assert np.abs(rows - matrix / UNIT).max() < 2e-3


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_a_decoder_made_from_the_specification_agrees(bands, components, seed):
    rng = np.random.default_rng(seed)
    matrix = spectral.fixed_point(orthonormal(bands, seed)[:components])
    far = [0, 1, -1, MOST, -MOST, (1 << 31) - 1, -(1 << 31)]
    values = rng.choice([*far, *rng.integers(-(1 << 20), 1 << 20, 20)], (3, 4, len(matrix))).astype("i4")
    decoded = spectral.inverse(values, matrix)
    planes = np.moveaxis(values, -1, 1)[..., None].astype(int)
    np.testing.assert_array_equal(bands_of_components(planes, matrix.astype(int))[:, :, 0], decoded)


def test_components_are_exact_sums():
    """Of the largest values, and of more pixels than are computed at a time."""
    rng = np.random.default_rng(0)
    matrix = spectral.fixed_point(orthonormal(7))
    values = rng.choice([-spectral.MAX_VALUE, spectral.MAX_VALUE, 12345, 0], (1, 300, 300, 7)).astype("i4")
    bits = spectral.PRECISE_BITS - FRACTION_BITS
    half = 1 << bits - 1
    wanted = values.astype("i8") @ spectral.refined(matrix).T + half >> bits
    np.testing.assert_array_equal(spectral.forward(values, matrix), wanted)
    wide = rng.choice([-spectral.MAX_VALUE, spectral.MAX_VALUE], (1, 1, 3, 256)).astype("i4")
    matrix = spectral.fixed_point(orthonormal(256))
    wanted = (wide.astype(object) @ spectral.refined(matrix).T.astype(object) + half) // (1 << bits)
    np.testing.assert_array_equal(spectral.forward(wide, matrix), wanted.astype("i8"))


def test_sums_of_damaged_payloads_are_exact():
    """Of the worst matrix that a decoder accepts: all rows lean to one band as far as the deviation allows."""
    count = 256
    axis, first = np.full(count, count**-0.5), np.eye(count)[0]
    rotation = np.eye(count) - 2 * np.outer(axis - first, axis - first) / np.square(axis - first).sum()
    longest = 1 + count * MAX_DEVIATION * 0.9  # squared, of the first column, which is the axis
    rotation[:, 0] *= longest**0.5
    matrix = spectral.fixed_point(rotation)
    assert MAX_DEVIATION / 2 < deviation(matrix) <= MAX_DEVIATION
    rows = spectral.refined(matrix)
    assert np.abs(rows).sum(axis=0).max() * MOST < 1.01 * (1 << 52)  # as of orthonormal rows
    components = (np.sign(rows[:, :1].T) * MOST).astype("i4")
    bits = spectral.PRECISE_BITS + FRACTION_BITS
    wanted = [(int(total) + (1 << bits - 1)) >> bits for total in (components.astype(object) @ rows.astype(object))[0]]
    assert spectral.inverse(components, matrix)[0].tolist() == wanted


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 2), sizes, sizes, st.integers(2, spectral.FEW_BANDS)),
    st.sampled_from(["u1", "i1", "u2", "i2", "i4"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_rows_of_few_bands_give_what_matrices_give(shape, dtype, first, seed):
    """Of the largest values, in any memory order, and of damaged components."""
    rng, info = np.random.default_rng(seed), np.iinfo(dtype)
    low, high = max(info.min, -spectral.MAX_VALUE), min(info.max, spectral.MAX_VALUE)
    values = rng.choice([low, high, *rng.integers(low, high, 5)], shape).astype(dtype)
    values = np.moveaxis(np.moveaxis(values, -1, 0).copy(), 0, -1) if first else values
    matrix = spectral.fixed_point(orthonormal(shape[-1], seed))[: 1 + seed % shape[-1]]
    far = [0, MOST, -MOST - 1, (1 << 31) - 1, -(1 << 31), *rng.integers(-(1 << 20), 1 << 20, 20)]
    damaged = rng.choice(far, (shape[0], len(matrix), *shape[1:3])).astype("i4")

    def results():
        components = components_of(values, matrix)
        decoded = [_restored(one, matrix, np.dtype(dtype), None) for one in (components, damaged)]
        narrow = values >> 6 if dtype == "i4" else values
        return *spectral._difference_products(narrow, None), components, *decoded

    few = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectral, "FEW_BANDS", 0)
        many = results()
    for one, other in zip(few, many, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize("bands", [2, 5, 16, 33])
def test_components_are_uncorrelated_and_in_order(bands):
    values = alike(40, 50, bands)
    components = spectral.forward(values, fit(values)).astype("f8")
    differences = [np.diff(components, axis=axis).reshape(-1, bands) for axis in (1, 2)]
    covariance = np.concatenate(differences).T @ np.concatenate(differences)
    energy = np.diagonal(covariance)
    assert (np.diff(energy) <= energy[0] * 1e-3).all()
    assert np.abs(covariance - np.diag(energy)).max() <= energy[0] * 1e-3
    assert energy[3:].sum() < energy[:3].sum() / 100 or bands < 4


def test_the_matrix_depends_on_nothing_but_the_values():
    values = alike(33, 47, 7)
    matrix = fit(values)
    for other in (np.asfortranarray(values), values.astype("u2"), np.repeat(values, 2, axis=-1)[..., ::2]):
        np.testing.assert_array_equal(fit(other), matrix)
    moved = np.moveaxis(np.ascontiguousarray(np.moveaxis(values, -1, 0)), 0, -1)
    np.testing.assert_array_equal(fit(moved, np.zeros(values.shape, bool)), matrix)
    # What this machine computes, every machine computes.
    assert matrix[:2].tolist() == EXPECTED


EXPECTED = [[6213, 6177, 5934, 5942, 6312, 6327, 6425], [1246, 2729, 7325, 7609, -7910, -655, -9214]]


def test_the_matrix_does_not_depend_on_threads():
    code = "from tests.codec.test_spectral import *; print(fit(alike(300, 300, 12)).tolist())"
    outputs = []
    for threads in ("1", "4"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, threads)
        outputs.append(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True))
    assert outputs[0].stdout == outputs[1].stdout != b""


def test_masked_samples_do_not_count():
    values = alike(30, 40, 5)
    mask = np.zeros(values.shape, bool)
    mask[:, 5:9, 10:20] = mask[:, 20, 30, 2] = True
    damaged = np.where(mask, 64000, values)
    np.testing.assert_array_equal(fit(values, mask), fit(damaged, mask))
    assert (fit(damaged) != fit(values)).any()


def test_differences_do_not_reach_from_slice_to_slice():
    values = alike(20, 20, 4, slices=2)
    products = [spectral._difference_products(part, None) for part in (values, values[:1], values[1:])]
    assert products[0][1] == products[1][1] + products[2][1] == 2 * (20 * 19 + 19 * 20)
    np.testing.assert_array_equal(products[0][0], products[1][0] + products[2][0])


def test_rows_of_large_chunks_are_skipped():
    values = unlike(64, 64, 256, 255)
    assert spectral._line_step(values) == 1
    wide = np.broadcast_to(values[:, :1], (1, 1024, 64, 256))
    assert spectral._line_step(wide) > 1
    assert spectral._difference_products(wide, None)[1] < 1024 * 64


def test_choice():
    assert spectral.choose(unlike(64, 64, 5), None, 50) is None
    matrix = spectral.choose(alike(64, 64, 5), None, 50)
    assert matrix is not None and matrix.shape == (5, 5)
    assert spectral.choose(alike(64, 64, 5)[:, :3, :3], None, 50) is None  # the section would take more


def test_a_large_step_leaves_nothing_to_save():
    values = alike(64, 64, 5)
    assert spectral.choose(values, None, 1) is not None
    assert spectral.choose(values, None, 1e6) is None


def test_values_of_many_bits_are_fitted():
    values = alike(64, 64, 4, depth=1 << 20)
    matrix = spectral.choose(values, None, 64)
    assert matrix is not None
    narrow = spectral.choose(values >> 5, None, 2)
    np.testing.assert_array_equal(narrow, matrix)


def test_a_smooth_image_of_few_steps_is_worth_a_transform():
    """Its neighbours differ by less than a step, which blocks of pixels do not."""
    ramp = np.mgrid[:200, :200].sum(axis=0)[None, ..., None] * 20
    noise = np.random.default_rng(0).normal(0, 5, (1, 200, 200, 6))
    assert spectral.choose((ramp * np.arange(1, 7) / 6 + noise).astype("i4"), None, 100) is not None


def test_root_mean_squares_are_exact():
    components = unlike(20, 30, 3) - 20000
    found = 16 * spectral.root_mean_squares(components)
    np.testing.assert_allclose(found, np.sqrt(np.square(components.astype("f8")).mean(axis=(0, 1, 2))), rtol=1e-4)
    few = components % 7
    np.testing.assert_array_equal(16 * spectral.root_mean_squares(few), np.sqrt(np.square(few).mean(axis=(0, 1, 2))))


def test_the_matrix_of_the_caller_is_sorted_by_energy():
    values = alike(40, 40, 3)
    values[..., 0] //= 100
    values[..., 1] //= 10
    matrix = spectral.choose(values, None, 1, np.eye(3))
    np.testing.assert_array_equal(matrix, UNIT * np.eye(3)[::-1])


@pytest.mark.parametrize("bands", [1, 2, 20])
@pytest.mark.parametrize("value", [0, 9, -70000])
def test_constant_bands(bands, value):
    values = np.full((1, 20, 30, bands), value, np.int32)
    matrix = fit(values)
    np.testing.assert_array_equal(spectral.inverse(spectral.forward(values, matrix), matrix), values)
    assert spectral.choose(values, None, 1) is None


@pytest.mark.parametrize("bands", [2, 6, 256])
def test_equal_bands(bands):
    values = np.repeat(alike(24, 40, 1), bands, axis=-1)
    matrix = fit(values)
    assert np.abs(matrix[0] - UNIT / bands**0.5).max() <= 1
    components = spectral.forward(values, matrix)
    assert np.abs(components[..., 1:]).max() <= 16 + 8 * bands  # what rounding leaves of sums of rows that are 0
    assert np.abs(spectral.inverse(components, matrix) - values).max() <= 1


def test_most_bands():
    values = alike(16, 16, 256)
    matrix = fit(values)
    assert deviation(matrix) < 2e-3
    back = spectral.inverse(spectral.forward(values, matrix), matrix)
    assert np.square((back - values).astype("f8")).mean() < 0.4


def test_a_matrix_of_another_size_is_refused():
    codec = DeepSIC(spectral=np.eye(2), transform="wavelet")
    check_rejects(ConfigurationError, "spectral|2 x 2 for 3 bands", codec.encode, photograph(20, 30, 3))


def wavelet_payload(**options):
    array = alike(40, 50, 6, depth=255).astype("u1")[0]
    return h.unpack(DeepSIC(semantics="none", transform="wavelet", quality=90, **options).encode(array))


def test_sections_fit_each_other():
    payload = wavelet_payload()
    header = payload.header
    fields = {name: getattr(header, name) for name in ("dtype", "shape", "order", "axes", "decoder", "head")}
    fields |= {"quality": header.quality, "grid": header.grid, "grouping": header.grouping}
    wavelet, matrix = payload.read(WAVELET), payload.read(SPECTRAL)
    assert parse_payload(h.pack(**fields, sections={SPECTRAL: matrix, WAVELET: wavelet})).matrix is not None
    for sections, words in (
        ({SPECTRAL: matrix}, "the features section is missing"),
        ({FEATURES: b"123", WAVELET: wavelet}, "both a features section and a wavelet section"),
        ({FEATURES: b"123", SPECTRAL: matrix}, "one image of 6 bands"),
    ):
        check_rejects(CorruptPayload, words, parse_payload, h.pack(**fields, sections=sections))
    fields["grouping"] = 1
    check_rejects(
        CorruptPayload,
        "a spectral transform section without a wavelet section",
        parse_payload,
        h.pack(**fields, sections={FEATURES: b"123", SPECTRAL: matrix}),
    )


def test_a_transform_saves_bytes_at_a_smaller_error():
    values = alike(128, 128, 6)[0].astype("u2")
    lengths, errors = [], []
    for parameter in ("none", "auto"):
        codec = DeepSIC(quality=100, transform="wavelet", semantics="none", spectral=parameter)
        payload = codec.encode(values)
        assert (h.read_header(payload).entry(SPECTRAL.kind) is None) == (parameter == "none")
        lengths.append(len(payload))
        errors.append(np.square(codec.decode(payload).astype("f8") - values).mean())
        assert codec.encode(np.array(values, order="F"))[60:] == payload[60:]
    assert lengths[1] < 0.75 * lengths[0] and errors[1] < 1.1 * errors[0]
