"""The search for a PSNR or a size: what is tried next, and what a trial computes."""

import math

import numpy as np
import pytest

from deepsic_codec import DeepSIC
from deepsic_codec.codec.rate_search import MAX_TRIALS, RateSearch, Trial
from tests.common import photograph, psnr

PIXELS = 100_000


def search_of(curve, min_step=1.0, extent=255.0, **target):
    """Run a search against a function of quality and step; return the search and all that it tried."""
    search = RateSearch(DeepSIC(**target), PIXELS, extent, min_step)
    tried = []
    while not search.done:
        quality, step = search.quality, search.step
        tried.append((quality, step))
        decibels, nbytes = curve(quality, step)
        search.add(Trial(quality, step, decibels, bytes(nbytes)))
    return search, tried


def curve(quality, step=None):
    """Decibels and bytes that rise with the quality; a residual adds what its step says."""
    if step is None:
        return 20 + quality / 4, round(2000 * 1.03**quality)
    return 20 * math.log10(255 / step) + 10.8, round(3000 + 20_000 * math.log2(1 + 64 / step))


@pytest.mark.parametrize("target", [22.0, 30.0, 32.5, 44.9])
def test_psnr_is_met(target):
    search, tried = search_of(curve, psnr=target)
    best = search.candidates[0]
    assert abs(best.decibels - target) <= 0.05 and sum(step is None for _, step in tried) <= 6


@pytest.mark.parametrize("nbytes", [2100, 8000, 30_000])
def test_size_is_met(nbytes):
    search, tried = search_of(curve, bpp=8 * nbytes / PIXELS)
    best = search.candidates[0]
    assert abs(best.nbytes / nbytes - 1) <= 0.01 and sum(step is None for _, step in tried) <= 8


@pytest.mark.parametrize("target,quality", [({"psnr": 80}, 100), ({"psnr": 5}, 1), ({"bpp": 1e-3}, 1)])
def test_out_of_reach_gets_the_closest(target, quality):
    search, tried = search_of(curve, min_step=255.0, **target)
    assert [trial.quality for trial in search.candidates] == [quality] and len(tried) <= MAX_TRIALS


def test_high_qualities_try_a_residual_too():
    search, tried = search_of(curve, min_step=1.0, psnr=40)
    assert {step is None for _, step in tried} == {True, False}
    assert {trial.step is None for trial in search.candidates} == {True, False}
    assert all(abs(trial.decibels - 40) <= 0.2 for trial in search.candidates)
    assert all(quality == 20 for quality, step in tried if step is not None)
    search, tried = search_of(curve, min_step=1.0, psnr=30)  # below quality 50 it cannot pay
    assert {step for _, step in tried} == {None}


@pytest.mark.parametrize("target", [{"psnr": 52}, {"bpp": 8 * 60_000 / PIXELS}])
def test_the_search_of_a_step_starts_afresh(target):
    """Features stay below either target; results at their qualities say nothing of steps, whose numbers overlap."""

    def far_from_the_first_guess(quality, step):
        return curve(quality / 2) if step is None else curve(quality, 3 * step)

    search, tried = search_of(far_from_the_first_guess, min_step=1e-3, **target)
    qualities, steps = ([pair for pair in tried if (pair[1] is None) == features] for features in (True, False))
    best = search.candidates[-1]
    assert best.step is not None and 2 < len(steps) <= 8 and qualities == tried[: len(qualities)]
    if "psnr" in target:
        assert abs(best.decibels - 52) <= 0.05
    else:
        assert abs(best.nbytes / 60_000 - 1) <= 0.01


def test_steps_of_a_residual_stay_within_their_bounds():
    _, tried = search_of(lambda quality, step: (20 + quality / 100, 1), min_step=1.0, psnr=70)
    steps = [step for _, step in tried if step is not None]
    assert steps and min(steps) >= 0.99 and max(steps) <= 255


def test_a_result_within_the_size_beats_a_closer_one_above_it():
    def coarse(quality, step):
        return (quality / 2, round(10_000 + 10 * quality)) if step is None else (20, 12_500)

    search, _ = search_of(coarse, min_step=1.0, bpp=8 * 12_000 / PIXELS)
    assert [(trial.quality, trial.step, trial.nbytes) for trial in search.candidates] == [(100, None, 11_000)]
    search, _ = search_of(coarse, min_step=1.0, bpp=8 * 12_400 / PIXELS)
    assert [trial.nbytes for trial in search.candidates] == [11_000, 12_500]


@pytest.fixture(scope="module")
def chunks():
    pytest.importorskip("torch")  # these are for the model itself
    return [photograph(64, 80, 3, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("target", [{"psnr": 38}, {"psnr": 52}, {"bpp": 1}, {"bpp": 12}, {"max_error": 2}], ids=str)
def test_nothing_that_was_coded_is_decoded(monkeypatch, chunks, target):
    from deepsic_codec.model import runtime
    from deepsic_codec.payload.coders import residual

    def never(*args, **kwargs):
        raise AssertionError("decoded while encoding")

    codec = DeepSIC(**target)
    expected = codec.encode_batch(chunks)
    monkeypatch.setattr(runtime, "decode_symbols", never)
    monkeypatch.setattr(runtime, "start_decoding", never)
    monkeypatch.setattr(residual, "decode_integers", never)
    assert codec.encode_batch(chunks) == expected


def test_chunks_with_different_targets_in_one_batch(chunks):
    from deepsic_codec.codec.chunk import prepare_chunk
    from deepsic_codec.codec.encode import encode_chunks

    codecs = [DeepSIC(psnr=36), DeepSIC(bpp=1.5), DeepSIC(quality=70), DeepSIC(max_error=3), DeepSIC(psnr=50)]
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

    payload = DeepSIC(psnr=34).encode(chunks[0])
    quality = unpack(payload).header.quality
    assert DeepSIC(quality=quality).encode(chunks[0]) == payload
    assert unpack(payload).read(LABELS) is not None
    bare = DeepSIC(psnr=34, semantics="none").encode(chunks[0])
    assert unpack(bare).read(LABELS) is None and unpack(bare).header.quality == quality
