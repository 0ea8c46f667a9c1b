"""Batches of the bundled model: round trips, order, labels, threads, damage."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from deepsic_codec import config
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.model.networks import step_lambda
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.torch_scheduler import CONCURRENT_BATCHES, TorchScheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.payload.fields import Quantiser
from deepsic_codec.samples import drone_frame, eurosat_mosaic
from tests.common import psnr


@pytest.fixture(scope="module")
def runtime():
    return get_scheduler(find_model("base"))


@pytest.fixture(scope="module")
def tiles():
    """Nine cells of real imagery, one image each."""
    mosaic = eurosat_mosaic()
    mosaic = mosaic[0] if isinstance(mosaic, tuple) else mosaic
    return [np.ascontiguousarray(mosaic[None, y : y + 64, x : x + 64]) for y in (0, 192, 384) for x in (0, 320, 512)]


def decode(runtime, encoded, images):
    columns = zip(*((e.features, i.shape[:3], e.quantiser) for e, i in zip(encoded, images, strict=True)), strict=True)
    return runtime.decode(*columns)


def test_quality_trades_bytes_for_error(runtime):
    frame = drone_frame()[None, 300:556, 400:656]
    sizes, errors = [], []
    for quality in (5.0, 25.5, 50.0, 75.25, 95.0):
        encoded = runtime.encode([frame], [quality])
        sizes.append(len(encoded[0].features))
        errors.append(psnr(decode(runtime, encoded, [frame])[0], frame))
    assert sizes == sorted(sizes) and errors == sorted(errors)
    assert errors[-1] > 34 and sizes[0] < frame.size / 60


@pytest.mark.parametrize("height,width", [(1, 1), (1, 17), (16, 16), (33, 5), (65, 64), (70, 131)])
def test_odd_sizes(runtime, height, width):
    image = drone_frame()[None, 500 : 500 + height, 700 : 700 + width]
    encoded = runtime.encode([image], [80.0])
    assert encoded[0].grid == (-(-height // 16), -(-width // 16))
    assert encoded[0].cells.shape == (1, -(-height // 64), -(-width // 64), runtime.info.outputs)
    decoded = decode(runtime, encoded, [image])[0]
    assert decoded.shape == image.shape and psnr(decoded, image) > 28


def test_alone_or_among_others(runtime, tiles):
    """Labels agree within 1/255, and every payload decodes, whatever the batch."""
    images = (tiles * 8)[:65]
    quality = [50.0] * len(images)
    joint = runtime.encode(images, quality)
    for image, one in zip(tiles, joint, strict=False):
        alone = runtime.encode([image], [50.0])[0]
        assert np.abs(alone.cells.astype(int) - one.cells).max() <= 1
        assert psnr(decode(runtime, [alone], [image])[0], decode(runtime, [one], [image])[0]) > 45
    for image, decoded in zip(images, decode(runtime, joint, images), strict=True):
        assert psnr(decoded, image) > 27


def test_symbols_do_not_depend_on_threads(runtime, tiles):
    encoded = runtime.encode(tiles, [50.0] * len(tiles))
    features, shapes = [e.features for e in encoded], [i.shape[:3] for i in tiles]
    arguments = features, shapes, [e.quantiser for e in encoded]
    expected = runtime.decode_symbols(*arguments)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            for i, one in enumerate(runtime.decode_symbols(*arguments)):
                np.testing.assert_array_equal(one, expected[i])
            alone = runtime.decode_symbols(*(column[:1] for column in arguments))[0]
            np.testing.assert_array_equal(alone, expected[0])
    finally:
        torch.set_num_threads(before)


def test_slices_of_one_chunk(runtime, tiles):
    chunk = np.concatenate(tiles[:3])
    encoded = runtime.encode([chunk], [60.0])[0]
    assert encoded.cells.shape == (3, 1, 1, runtime.info.outputs)
    assert psnr(decode(runtime, [encoded], [chunk])[0], chunk) > 28


def test_labels_of_stored_features_agree_with_labels_of_latents(runtime, tiles):
    encoded = runtime.encode(tiles, [70.0] * len(tiles))
    settings = [i.shape[:3] for i in tiles], [e.quantiser for e in encoded]
    symbols = runtime.decode_symbols([e.features for e in encoded], *settings)
    post = runtime.score(symbols, *settings)
    classes = runtime.arch.classes
    pairs = zip((e.cells for e in encoded), post, strict=True)
    same = [np.argmax(cells[..., :classes]) == np.argmax(scores[..., :classes]) for cells, scores in pairs]
    assert np.mean(same) >= 0.8


def test_batch_limit_does_not_change_grids(runtime, tiles):
    with config.set(batch_pixels=64 * 64):
        small = runtime.encode(tiles, [50.0] * len(tiles))
    large = runtime.encode(tiles, [50.0] * len(tiles))
    assert [e.grid for e in small] == [e.grid for e in large]
    for one, two in zip(small, large, strict=True):
        assert abs(len(one.features) - len(two.features)) <= 8


def test_effort_saves_bytes_for_the_same_quality(runtime):
    frame = drone_frame()[None, 300:556, 400:656]
    cost = []
    for effort in (0, 1):
        encoded = runtime.encode([frame], [40.0], efforts=[effort])
        decoded = decode(runtime, encoded, [frame])[0].astype(float)
        bits = 8 * len(encoded[0].features) / (256 * 256)
        cost.append(bits + float(step_lambda(torch.tensor(40.0))) * np.square(decoded - frame).mean())
    assert cost[1] < cost[0]


def test_threads_batches(runtime, tiles):
    expected = decode(runtime, runtime.encode(tiles, [50.0] * 9), tiles)
    errors = []

    def work(i):
        try:
            image = [tiles[i % 9]]
            got = decode(runtime, runtime.encode(image, [50.0]), image)[0]
            assert psnr(got, expected[i % 9]) > 45
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not errors and not any(t.is_alive() for t in threads)


def test_damaged_features_are_refused_or_harmless(runtime, tiles):
    """Without the payload's checksums even wrong bytes give symbols in range or a typed error."""
    rng = np.random.default_rng(0)
    features = bytearray(runtime.encode(tiles[:1], [50.0])[0].features)
    for _ in range(20):
        broken = bytearray(features)
        broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        with contextlib.suppress(CorruptPayload):
            decoded = runtime.decode([bytes(broken)], [(1, 64, 64)], [Quantiser(50.0, True)])[0]
            assert decoded.shape == (1, 64, 64, 3)
    with pytest.raises(CorruptPayload, match="left over"):
        runtime.decode([bytes(features) + bytes(range(1, 100))], [(1, 64, 64)], [Quantiser(50.0, True)])


@pytest.fixture(scope="module")
def on_torch():
    return TorchScheduler(LoadedModel(find_model("base")))


def test_a_gpu_works_on_two_batches_at_a_time(on_torch, monkeypatch):
    """Dask may have many threads with a batch each."""
    now, peak, lock = [0], [0], threading.Lock()

    def slow(*arguments, **named):
        with lock:
            now[0] += 1
            peak[0] = max(peak[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return []

    monkeypatch.setattr(on_torch, "_run", slow)
    monkeypatch.setattr(on_torch, "_batches", threading.BoundedSemaphore(CONCURRENT_BATCHES))
    with ThreadPoolExecutor(6) as pool:
        for call in [
            pool.submit(call, [], []) for call in (on_torch.encode, lambda a, b: on_torch.decode(a, a, b)) * 3
        ]:
            call.result()
    assert peak[0] == CONCURRENT_BATCHES == 2


def test_results_agree_with_one_another(runtime, tiles):
    images = [tiles[0], tiles[1][:, :33, :50], tiles[2].astype(np.int16) * 64]
    qualities, shapes = [50.0, 90.0, 20.0], [image.shape[:3] for image in images]
    encoded = runtime.encode(images, qualities, symbols=True, pixels=True)
    features, quantisers = [one.features for one in encoded], [one.quantiser for one in encoded]
    assert quantisers == [(50.0, True), (90.0, True), (20.0, False)]
    decoded = runtime.decode(features, shapes, quantisers, [False, False, True])
    for one, pixels in zip(encoded, decoded, strict=True):
        assert one.pixels.dtype == pixels.dtype
        np.testing.assert_array_equal(one.pixels, pixels)
    symbols = [one.symbols for one in encoded]
    for one, other in zip(symbols, runtime.decode_symbols(features, shapes, quantisers), strict=True):
        np.testing.assert_array_equal(one.transpose(0, 3, 1, 2), other)
    assert runtime.encode_symbols(symbols, shapes, quantisers) == features
    first = symbols[:2], shapes[:2], quantisers[:2], False
    for one, pixels in zip(runtime.synthesise(*first), decoded, strict=False):
        np.testing.assert_array_equal(one, pixels)
    bare = runtime.encode(images, qualities, features=False, labels=False, symbols=True)
    for one, other in zip(bare, symbols, strict=True):
        assert one.features is one.cells is one.pixels is None
        np.testing.assert_array_equal(one.symbols, other)


@pytest.mark.parametrize("engine", ["cpu", 0, 2])
def test_each_chunk_goes_through_its_last_function(runtime, on_torch, tiles, monkeypatch, engine):
    if engine != "cpu":
        runtime = on_torch
        monkeypatch.setattr(runtime, "_prefetch", engine)
    images = [*tiles, tiles[0][:, :32], *tiles[:3]]
    qualities = [25.0 + number for number in range(len(images))]
    expected = runtime.encode(images, qualities)
    finish = [lambda one, number=number: (number, one.features) for number in range(len(images))]
    for threads in (1, 2):
        with config.set(threads=threads):
            result = runtime.encode(images, qualities, finish=finish)
        assert result == [(number, one.features) for number, one in enumerate(expected)]
    shapes = [image.shape[:3] for image in images]
    arguments = [one.features for one in expected], shapes, [one.quantiser for one in expected]
    add = [lambda pixels: int(pixels.sum())] * len(images)
    sums = runtime.decode(*arguments, finish=add)
    assert sums == [int(pixels.sum()) for pixels in runtime.decode(*arguments)]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_a_last_function_is_raised(runtime, tiles, threads):
    def fail(encoded):
        raise ValueError("cannot pack")

    with config.set(threads=threads), pytest.raises(ValueError, match="cannot pack"):
        runtime.encode(tiles, [50.0] * 9, finish=[*[lambda one: one] * 8, fail])


def test_torch_has_its_threads_again_after_an_error(on_torch, tiles, monkeypatch):
    before = torch.get_num_threads()
    used = []

    def fail(images, quality):
        used.append(torch.get_num_threads())
        raise ZeroDivisionError

    monkeypatch.setattr(on_torch.model, "analyse", fail)
    with config.set(threads=before + 1), pytest.raises(ZeroDivisionError):
        on_torch.encode(tiles[:1], [50.0])
    assert used == [before + 1] and torch.get_num_threads() == before


def test_map_keeps_the_order(runtime):
    assert runtime.map(lambda a, b: a - b, range(40), range(0, 80, 2)) == [-number for number in range(40)]
