"""The choice between features and wavelets, with the packaged model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepsic_codec import DeepSIC
from deepsic_codec.codec import transform
from deepsic_codec.codec.chunk import find_info, prepare_chunk
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.metrics import psnr
from deepsic_codec.payload.header import unpack
from deepsic_codec.payload.sections import FEATURES, LABELS, WAVELET
from deepsic_codec.samples import drone_frame, eurosat_mosaic


def coded_as(payload):
    return "features" if FEATURES.kind in unpack(payload).sections else "wavelet"


@pytest.fixture(scope="module")
def pictures():
    return {"satellite": eurosat_mosaic()[:192, :192], "photograph": drone_frame()[600:856, 600:856]}


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("satellite", {"quality": 30}, "features"),
        ("satellite", {"quality": 70}, "features"),
        ("satellite", {"bpp": 0.5}, "features"),
        ("satellite", {"psnr": 33}, "features"),
        ("photograph", {"quality": 90}, "wavelet"),
        ("photograph", {"bpp": 2.5}, "wavelet"),
        ("photograph", {"psnr": 45}, "wavelet"),
        ("photograph", {"psnr": 60}, "wavelet"),  # beyond what features reach
    ],
)
def test_the_transform_that_takes_fewer_bytes(pictures, name, target, expected):
    chunk = pictures[name]
    payload = DeepSIC(**target, semantics="none").encode(chunk)
    assert coded_as(payload) == expected
    assert payload == DeepSIC(**target, semantics="none", transform=expected).encode(chunk)


def test_estimates_are_near_to_what_wavelets_take(pictures):
    """Whatever is chosen, the other takes no less for the same error, but for the tolerance of an estimate."""
    for name, chunk in pictures.items():
        for quality in (25, 45, 65):
            options = {"semantics": "none", "quality": quality}
            features = DeepSIC(transform="features", **options).encode(chunk)
            error = psnr(chunk, DeepSIC().decode(features))
            wavelets = DeepSIC(transform="wavelet", psnr=error, semantics="none").encode(chunk)
            ratio = len(wavelets) / len(features)
            if not 0.88 < ratio < 1.12:
                chosen = coded_as(DeepSIC(**options).encode(chunk))
                assert chosen == ("wavelet" if ratio < 1 else "features"), (name, quality, ratio)


@pytest.mark.parametrize(
    "options",
    [{"tune": "ms-ssim", "effort": 2}, {"rmse": 3}, {"value_range": (0, 200)}, {"label_bands": 0}, {"quality": 120}],
    ids=str,
)
def test_what_only_one_of_them_does_needs_no_trial(options):
    chunk = prepare_chunk(CodecParams(**options), np.zeros((64, 64, 3), "u1"))
    assert not chunk.undecided
    assert chunk.features == ("tune" in options)


def test_a_small_chunk_is_coded_once(pictures, monkeypatch):
    """Features of a chunk that is one window are those of the trial, with labels."""
    calls = []
    encode = transform.encode_tasks
    monkeypatch.setattr(transform, "encode_tasks", lambda *a, **k: calls.append(len(a[0])) or encode(*a, **k))
    monkeypatch.setattr(
        "deepsic_codec.codec.encode.encode_tasks", lambda *a, **k: calls.append(a[0]) or encode(*a, **k)
    )
    chunk = pictures["satellite"][:64, :64]
    payload = DeepSIC(label_tile=64).encode(chunk)
    assert [one for one in calls if one] == [1]
    assert payload == DeepSIC(label_tile=64, transform="features").encode(chunk)
    assert LABELS.kind in unpack(payload).sections


@pytest.mark.parametrize(
    ("name", "edge", "quality", "coded"),
    [("photograph", 64, 40, 0), ("photograph", 160, 60, 0), ("satellite", 160, 40, 1)],
)
def test_wavelets_are_coded_where_an_estimate_is_not_enough(pictures, name, edge, quality, coded, monkeypatch):
    calls, at_code = [], transform.WaveletEncoder.at_code
    monkeypatch.setattr(transform.WaveletEncoder, "at_code", lambda *args: calls.append(args) or at_code(*args))
    chunk = prepare_chunk(CodecParams(quality=quality), pictures[name][:edge, :edge])
    transform.choose_transforms([chunk], find_info(*chunk.key))
    assert len(calls) == coded


def test_wavelets_are_chosen_where_an_estimate_of_them_is_twice_too_high():
    chunk = np.ascontiguousarray(drone_frame()[192:384, 384:576])
    features = DeepSIC(quality=30, semantics="none", transform="features")
    payload = features.encode(chunk)
    wavelets = DeepSIC(psnr=psnr(features.decode(payload), chunk), semantics="none", transform="wavelet")
    assert len(wavelets.encode(chunk)) < len(payload)
    chosen = DeepSIC(quality=30, semantics="none").encode(chunk)
    assert WAVELET.kind in unpack(chosen).sections


def test_chunks_of_a_batch_are_decided_one_by_one(pictures):
    chunks = [prepare_chunk(CodecParams(quality=40), picture) for picture in pictures.values()]
    chunks.append(prepare_chunk(CodecParams(quality=40, nodata=7), np.full((200, 200, 3), 7, "u1")))
    chunks.append(prepare_chunk(CodecParams(quality=40, transform="wavelet"), pictures["satellite"]))
    decided, payloads = transform.choose_transforms(chunks, find_info(*chunks[0].key))
    assert [one.params.transform for one in decided] == ["features", "wavelet", "wavelet", "wavelet"]
    assert decided[3] is chunks[3]
    assert not payloads


@given(st.tuples(st.integers(1, 9), st.integers(1, 700), st.integers(1, 700)))
def test_windows_are_parts_of_the_chunk(shape):
    y, x = np.arange(shape[1])[:, None], np.arange(shape[2])
    samples = np.empty((*shape, 3), np.int32)
    samples[..., 0], samples[..., 1] = y, x
    samples[..., 2] = np.arange(shape[0])[:, None, None]
    parts = transform.windows(samples)
    pixels = shape[0] * shape[1] * shape[2]
    assert parts.shape[1:] == (min(shape[1], transform.WINDOW), min(shape[2], transform.WINDOW), 3)
    assert 1 <= len(parts) <= transform.MAX_WINDOWS
    assert len(parts) == 1 or parts[..., 0].size <= pixels / 4
    for part in parts:
        top, left, number = part[0, 0]
        np.testing.assert_array_equal(part, samples[number, top : top + part.shape[0], left : left + part.shape[1]])
    assert len({tuple(part[0, 0]) for part in parts}) == len(parts)


@pytest.mark.parametrize("options", [{}, {"semantics": "none"}, {"tune": "ms-ssim", "effort": 2}], ids=str)
def test_few_colours_are_stored_without_loss_where_features_take_more_bytes(options):
    """Also if no band alone has few of all values, and without labels that get lost."""
    frame = drone_frame()[:192, :192]
    image = np.asarray(Image.fromarray(frame).quantize(4).convert("RGB"))
    if "tune" in options:
        pytest.importorskip("torch")
    codec = DeepSIC(quality=70, label_tile=64, **options)
    features = codec.changed(transform="features").encode(image)
    payload = codec.encode(image)
    assert len(payload) < len(features)
    np.testing.assert_array_equal(codec.decode(payload), image)
    assert (LABELS.kind in unpack(payload).sections) == (options.get("semantics") != "none")
    assert FEATURES.kind in unpack(features).sections
    exact = codec.changed(quality=None, max_error=0, tune="mse", effort=1).encode(image)
    assert unpack(payload).sections == unpack(exact).sections


def test_values_are_few_where_each_band_has_few():
    colours = np.random.default_rng(0).integers(0, 256, (60, 3), "u1")
    image = np.repeat(colours, 40, axis=0).reshape(60, 40, 3)
    assert np.unique(image).size > 64
    codec = DeepSIC(quality=90, semantics="none")
    np.testing.assert_array_equal(codec.decode(codec.encode(image)), image)
