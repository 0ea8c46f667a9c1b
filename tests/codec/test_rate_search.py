"""The search for a PSNR, an error or a size: what is tried next, and what a trial computes."""

import numpy as np
import pytest

from deepsic_codec import DeepSIC
from deepsic_codec.codec.rate_search import MAX_TRIALS, RateSearch, Trial
from deepsic_codec.codec.wavelet import _Curve, _search
from deepsic_codec.model.batch import Encoded
from deepsic_codec.payload.fields import Quantiser
from deepsic_codec.payload.steps import PER_OCTAVE, STEPS
from tests.common import photograph, psnr

PIXELS = 100_000


def search_of(curve, **target):
    """Run a search against a function of quality; return the search and the qualities that it tried."""
    search = RateSearch(DeepSIC(**target), PIXELS)
    tried = []
    while not search.done:
        tried.append(search.quality)
        decibels, nbytes = curve(search.quality)
        encoded = Encoded((1, 1), Quantiser(search.quality, False))
        search.add(Trial(encoded, decibels, bytes(nbytes)))
    return search, tried


def curve(quality):
    """Decibels and bytes that rise with the quality."""
    return 20 + quality / 4, round(2000 * 1.03**quality)


@pytest.mark.parametrize("target", [22.0, 30.0, 32.5, 44.9])
def test_psnr_is_met(target):
    search, tried = search_of(curve, psnr=target)
    assert abs(search.best.decibels - target) <= 0.05 and len(tried) <= 6


@pytest.mark.parametrize("nbytes", [2100, 8000, 30_000])
def test_size_is_met(nbytes):
    search, tried = search_of(curve, bpp=8 * nbytes / PIXELS)
    assert abs(len(search.best.payload) / nbytes - 1) <= 0.01 and len(tried) <= 8


@pytest.mark.parametrize("target,quality", [({"psnr": 80}, 100), ({"psnr": 5}, 1), ({"bpp": 1e-3}, 1)])
def test_out_of_reach_gets_the_closest(target, quality):
    search, tried = search_of(curve, **target)
    assert search.best.encoded.quantiser.quality == quality and len(tried) <= MAX_TRIALS


class Steps:
    """A curve over codes of steps, and trials that differ from it by a factor, an offset and a jump."""

    def __init__(self, slope=1.0, offset=0.0, jump=0.0):
        self.slope, self.offset, self.jump, self.tried = slope, offset, jump, []

    def curve(self, code):
        return 30 - code / PER_OCTAVE

    def trial(self, code):
        self.tried.append(code)
        value = 30 - self.slope * code / PER_OCTAVE + self.offset - self.jump * (code > 2000)
        return value, code


@pytest.mark.parametrize("target", [2.0, 15.3, 29.0])
@pytest.mark.parametrize("slope,offset,most", [(1.0, 0.0, 1), (1.0, 2.5, 2), (0.8, -1.0, 4), (1.4, 3.0, 4)])
def test_steps_are_found(target, slope, offset, most):
    steps = Steps(slope, offset)
    found = _search(_Curve(steps.curve), target, 0.0, steps.trial, 0.02)
    reached, _ = steps.trial(found)
    inside = 30 + offset - slope * (STEPS - 1) / PER_OCTAVE <= target <= 30 + offset
    assert not inside or abs(reached - target) <= 0.02
    assert len(steps.tried) - 1 <= most or not inside


def test_a_target_in_a_jump_gets_the_nearer_side():
    steps = Steps(jump=6.0)
    low, high = steps.trial(2001)[0], steps.trial(2000)[0]
    steps.tried.clear()
    for target in (low + 1, high - 1):
        found = _search(_Curve(steps.curve), target, 0.0, steps.trial, 0.02)
        assert abs(steps.trial(found)[0] - target) < 3 and len(steps.tried) < 30


def test_targets_beyond_a_bend_are_met():
    """Noise takes no bytes above some step, and many right below it."""

    def trial(code):
        return 16 - code / 2000 - max(0, code - 6000) / 30, code

    for target in (0.0, 6.0, 12.0):
        found = _search(_Curve(lambda code: 16 - code / 500), target, 0.0, trial, 0.02)
        assert abs(trial(found)[0] - target) < 0.3


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f4"])
def test_wavelets_meet_every_target(dtype):
    grey = np.stack([photograph(96, 112, 3, seed=seed) for seed in (1, 2)], axis=-1).reshape(96, 112, 6)
    unit = {"u1": 1, "<u2": 40, "<f4": 0.01}[dtype]
    array = (grey * np.float64(unit)).astype(dtype)
    ranges = (0, float(255 * unit))

    def encoded(**target):
        codec = DeepSIC(transform="wavelet", semantics="none", value_range=ranges, **target)
        payload = codec.encode(array)
        return len(payload), np.sqrt(np.square(codec.decode(payload).astype("f8") - array).mean())

    for bpp, share in ((2, 0.06), (8, 0.03), (20, 0.03)):  # at 2 noise comes and goes with the step
        assert abs(8 * encoded(bpp=bpp)[0] / (96 * 112) / bpp - 1) <= share
    for levels, share in ((2, 0.03), (8, 0.04)):  # at 8 there are 50 bytes, each of which counts
        assert abs(encoded(rmse=levels * unit)[1] / (levels * unit) - 1) <= share
    assert abs(20 * np.log10(255 * unit / encoded(psnr=38)[1]) - 38) <= 0.2
    sizes, errors = zip(*(encoded(quality=quality) for quality in (20, 60, 100, 140)), strict=True)
    assert list(sizes) == sorted(sizes) and list(errors) == sorted(errors, reverse=True)


@pytest.fixture(scope="module")
def chunks():
    return [photograph(64, 80, 3, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("target", [{"psnr": 38}, {"bpp": 1}, {"max_error": 2}], ids=str)
def test_nothing_that_was_coded_is_decoded(monkeypatch, chunks, target):
    from deepsic_codec.model.cpu.prior import Prior
    from deepsic_codec.payload.coders import residual

    def never(*args, **kwargs):
        raise AssertionError("decoded while encoding")

    codec = DeepSIC(transform="features", **target)
    expected = codec.encode_batch(chunks)
    monkeypatch.setattr(Prior, "decode", never)
    monkeypatch.setattr(residual, "decode_integers", never)
    assert codec.encode_batch(chunks) == expected


def test_chunks_with_different_targets_in_one_batch(chunks):
    from deepsic_codec.codec.chunk import prepare_chunk
    from deepsic_codec.codec.encode import encode_chunks

    targets = [{"psnr": 36}, {"bpp": 1.5}, {"quality": 70}, {"max_error": 3}, {"psnr": 50}]
    codecs = [DeepSIC(transform="auto" if "max_error" in target else "features", **target) for target in targets]
    arrays = [chunks[0], chunks[1], chunks[2], chunks[0], chunks[1]]
    together = encode_chunks([prepare_chunk(codec, array) for codec, array in zip(codecs, arrays, strict=True)])
    assert together == [codec.encode(array) for codec, array in zip(codecs, arrays, strict=True)]
    decoded = DeepSIC().decode_batch(together)
    assert abs(psnr(decoded[0], arrays[0]) - 36) <= 0.2
    assert abs(8 * len(together[1]) / (64 * 80) / 1.5 - 1) <= 0.03
    assert np.abs(decoded[3].astype(int) - arrays[3]).max() <= 3


def test_effort_and_labels_of_a_search_are_those_of_its_parameters(chunks):
    from deepsic_codec.payload.header import unpack
    from deepsic_codec.payload.sections import LABELS

    payload = DeepSIC(psnr=34, transform="features").encode(chunks[0])
    quality = unpack(payload).header.quality
    assert DeepSIC(quality=quality, transform="features").encode(chunks[0]) == payload
    assert unpack(payload).read(LABELS) is not None
    bare = DeepSIC(psnr=34, transform="features", semantics="none").encode(chunks[0])
    assert unpack(bare).read(LABELS) is None and unpack(bare).header.quality == quality
