"""Latent refinement: worth its time, harmless, and the same in windows."""

import numpy as np
import pytest
import torch

from deepsic_codec import DeepSIC, config
from deepsic_codec.codec.params import TUNES
from deepsic_codec.metrics import ms_ssim, psnr
from deepsic_codec.model import refine
from deepsic_codec.model.distortion import Distortion, total
from deepsic_codec.model.exact.formats import LATENT_BITS, STEP_BITS
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import drone_frame


@pytest.fixture(scope="module")
def runtime():
    return get_scheduler(find_model("base"))


def cost(runtime, image, quality, effort, tune="mse", measure="mse"):
    """Bits of an image (H,W,3) as it is stored, and what its distortion is worth in bits."""
    encoded = runtime.encode([image[None]], [quality], efforts=[effort], tunes=[tune])[0]
    q6 = image.dtype == np.int16
    arguments = [encoded.features], [(1, *image.shape[:2])], [encoded.quantiser], [q6]
    decoded = runtime.decode(*arguments)[0][0]
    unit = 64 if q6 else 1
    original, actual = (torch.from_numpy(v / unit).float()[None] for v in (image, decoded))
    whole = (slice(0, size) for size in image.shape[:2])
    error = float(total(Distortion(original, measure).residuals(actual, *whole)))
    return 8 * len(encoded.features) + float(refine.trade(torch.tensor([quality]))[0]) * error


@pytest.mark.parametrize("quality,dtype", [(20.0, "u1"), (65.5, "i2"), (80.0, "u1")])
def test_lowers_the_loss(runtime, quality, dtype):
    image = drone_frame()[600:757, 700:861]  # no multiple of 16
    image = image.astype("i2") * 64 if dtype == "i2" else np.ascontiguousarray(image)
    costs = [cost(runtime, image, quality, effort) for effort in (1, 2, 3, 4)]
    assert costs[1] < 0.99 * costs[0] and costs[3] < costs[2] < costs[1]


def test_noise_becomes_no_worse(runtime):
    """Where nothing can be predicted, moves made together could add up to harm."""
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype("u1")
    assert cost(runtime, image, 90.0, 3) <= 1.005 * cost(runtime, image, 90.0, 1)


def test_clips_what_the_decoder_clips(runtime):
    """Unclipped, the differentiable synthesis runs away here, and moves are judged by nonsense."""
    image = np.ascontiguousarray(drone_frame()[512:768, 768:1024])
    assert cost(runtime, image, 50.0, 2) < cost(runtime, image, 50.0, 1)


def test_expectation_is_that_of_the_probabilities():
    """Against probabilities made one by one, in double precision."""
    random = np.random.default_rng(3)
    for _ in range(50):
        symbol, mean = random.normal(0, 2), random.normal(0, 2)
        scale, curvature, temperature = random.uniform(0.3, 3, 3)
        slope, by_magnitude = random.normal(0, 1, 2)
        costs = []
        for k in (-1, 0, 1):
            at = round(symbol) + k
            bits = -np.log2(0.5 * (np.tanh((at + 0.5 - mean) / scale / 2) - np.tanh((at - 0.5 - mean) / scale / 2)))
            far = at - symbol
            costs.append(bits + slope * far + curvature * far**2 + by_magnitude * 4 * np.log2(1 + abs(at)))
        probabilities = np.exp(-(np.array(costs) - min(costs)) / temperature)
        expected = round(symbol) + (probabilities[2] - probabilities[0]) / probabilities.sum()
        arguments = (
            torch.tensor([v], dtype=torch.float32) for v in (symbol, mean, scale, slope, by_magnitude, curvature)
        )
        assert refine.expected(*arguments, temperature).item() == pytest.approx(expected, abs=2e-3)


def test_improbable_symbols_have_finite_costs():
    """Far out, where both edges of a symbol's bin round to the same probability."""
    far = torch.tensor([-300.0, 0.0, 250.4, 32767.0])
    zero = torch.zeros(4)
    actual = refine.expected(far, -far, torch.full((4,), 0.02), zero, zero, zero, 0.2)
    assert actual.isfinite().all() and (actual - far).abs().max() <= 1.5


def test_curvature_is_that_of_the_synthesis(runtime, monkeypatch):
    """The estimate from random signs, on average over positions, against symbols that are moved."""
    model = LoadedModel(find_model("base"))
    refiner = model.refiner()
    monkeypatch.setattr(refiner, "bf16", False)  # whose rounding is as large as what is measured
    frame = drone_frame()[600:728, 700:828]
    (encoded,) = runtime.encode([frame[None]], [50.0], [0], symbols=True)
    symbols = torch.from_numpy(encoded.symbols).float()
    step = model.transforms.steps(np.array([50.0]), False).float() * 2.0 ** -(LATENT_BITS + STEP_BITS)
    distortion = Distortion(torch.from_numpy(frame.copy())[None].float(), "mse")
    job = refine.RefineState(distortion, step, torch.tensor([50.0]))
    (window,) = refine.windows(*symbols.shape[1:3])
    refiner._differentiated(job, symbols, window)
    with torch.no_grad():
        still = refiner._decode(job, symbols)
        for channel in (0, 3, 12):
            measured = []
            for y in range(1, 8, 2):
                for x in range(1, 8, 2):
                    moved = symbols.clone()
                    moved[0, y, x, channel] += 0.25
                    moved = refiner._decode(job, moved)
                    measured.append(float((moved - still).square().sum()) * 16)
            assert float(job.curvature()[0, 0, 0, channel]) == pytest.approx(np.mean(measured), rel=0.4)


def test_windows_share_out_the_grid(monkeypatch):
    monkeypatch.setattr(refine, "WINDOW", 5)
    monkeypatch.setattr(refine, "HALO", 2)
    for size in ((1, 1), (5, 6), (13, 9)):
        count = np.zeros(size, int)
        for window in refine.windows(*size):
            count[window.inner] += 1
            index = np.arange(size[0] * size[1]).reshape(size)
            assert np.array_equal(index[window.outer][window.core], index[window.inner])
        assert (count == 1).all()


@pytest.mark.parametrize("tune", ["mse", "ms-ssim"])
def test_windows_cost_little(runtime, monkeypatch, tune):
    image = np.ascontiguousarray(drone_frame()[600:747, 700:850])
    whole = cost(runtime, image, 25.0, 3, tune, tune)
    monkeypatch.setattr(refine, "WINDOW", 6)
    assert cost(runtime, image, 25.0, 3, tune, tune) < 1.0015 * whole  # 1.0055 and 1.0069 if windows had no halo


@pytest.mark.parametrize("edge", [64, 157])
def test_lowers_the_loss_that_it_is_tuned_for(runtime, edge):
    """In small chunks, too, where there is little to measure curvatures by."""
    image = np.ascontiguousarray(drone_frame()[600 : 600 + edge, 700 : 700 + edge])
    actual = {(tune, of): cost(runtime, image, 40.0, 3, tune, of) for tune in TUNES for of in TUNES}
    assert actual["ms-ssim", "ms-ssim"] < 0.99 * actual["mse", "ms-ssim"]
    assert actual["mse", "mse"] < 0.99 * actual["ms-ssim", "mse"]


@pytest.mark.parametrize("quality", [25.0, 60.0])
def test_what_runs_away_is_not_kept(runtime, monkeypatch, quality):
    image = np.ascontiguousarray(drone_frame()[None, 600:664, 700:764])
    monkeypatch.setitem(refine.SCHEDULES, 3, refine.Schedule(3, 1.0, 5.0, 0.5))
    monkeypatch.setitem(refine.PATH_SCHEDULES, 3, refine.PathSchedule(3, 1.0, (5,), (9.0, 9.0)))
    before, after = (runtime.encode([image], [quality], efforts=[effort])[0].features for effort in (1, 3))
    assert before == after


def test_images_of_a_batch_do_not_see_each_other(runtime):
    frame = drone_frame()
    images = [np.ascontiguousarray(frame[None, y : y + 64, 300:364]) for y in (100, 500, 900)]
    qualities = [30.0, 55.5, 70.0]
    together = runtime.encode(images, qualities, efforts=[3] * 3)
    for image, quality, among in zip(images, qualities, together, strict=True):
        alone = runtime.encode([image], [quality], efforts=[3])[0]
        # products of other sizes round otherwise, which tips a symbol here and there
        assert abs(len(alone.features) - len(among.features)) <= 0.02 * len(alone.features) + 4


def test_images_of_a_chunk_weigh_the_same():
    """However many are differentiated at once."""
    image = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0)) * 255
    step, quality = torch.full((3, 4), 0.1), torch.full((3,), 50.0)
    prices = []
    for sizes in ((3,), (2, 1), (1, 1, 1)):
        states, start = [], 0
        for size in sizes:
            part = slice(start, start + size)
            state = refine.RefineState(Distortion(image[part], "ms-ssim"), step[part], quality[part])
            state._slopes = torch.arange(1.0, 4).reshape(3, 1, 1, 1)[part].expand(-1, -1, -1, 4) ** 5
            states, start = [*states, state], start + size
        prices.append(refine._path_prices(states))
    for price, weights in prices[1:]:
        torch.testing.assert_close(price, prices[0][0])
        torch.testing.assert_close(weights, prices[0][1])


def test_through_the_codec_with_a_bound():
    image = np.ascontiguousarray(drone_frame()[600:700, 700:780])
    codec = DeepSIC(quality=40, max_error=3, effort=3)
    with config.set(precision="float32"):
        payload = codec.encode_batch([image])[0]
    decoded = codec.decode_batch([payload])[0]
    assert np.abs(decoded.astype(int) - image).max() <= 3


def test_tuned_for_ms_ssim():
    """A higher MS-SSIM for its bytes than with the same effort for PSNR."""
    image = np.ascontiguousarray(drone_frame()[600:856, 700:956])
    points = {}
    for tune in ("mse", "ms-ssim"):
        for quality in (30, 45):
            codec = DeepSIC(quality=quality, semantics="none", effort=3, tune=tune)
            payload = codec.encode_batch([image])[0]
            decoded = codec.decode_batch([payload])[0]
            points[tune, quality] = len(payload), -np.log(1 - ms_ssim(image, decoded)), psnr(image, decoded)
    (low, low_score, _), (high, high_score, _) = points["mse", 30], points["mse", 45]
    size, score, _ = points["ms-ssim", 45]
    assert low < size < high
    share = np.log(size / low) / np.log(high / low)
    assert score > low_score + (high_score - low_score) * share + 0.05
    assert points["ms-ssim", 45][2] < points["mse", 45][2]


def test_chunks_tuned_otherwise_are_no_batch(runtime):
    image = np.ascontiguousarray(drone_frame()[None, 600:664, 700:764])
    together = runtime.encode([image] * 2, [40.0] * 2, efforts=[3, 3], tunes=["mse", "ms-ssim"])
    for tune, among in zip(("mse", "ms-ssim"), together, strict=True):
        assert runtime.encode([image], [40.0], efforts=[3], tunes=[tune])[0].features == among.features
    assert together[0].features != together[1].features


def test_the_last_round_decides_all_groups(runtime, monkeypatch):
    """Also of models with more groups than the schedules know: what is left undecided is no path."""
    monkeypatch.setitem(refine.PATH_SCHEDULES, 3, refine.PathSchedule(1, 1.0, (1, 2), (0.3, 0.3)))
    image = np.ascontiguousarray(drone_frame()[None, 600:664, 700:764])
    before, after = (runtime.encode([image], [60.0], efforts=[effort])[0].features for effort in (1, 3))
    assert len(after) < len(before)
