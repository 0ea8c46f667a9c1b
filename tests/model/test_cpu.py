"""The engine of a CPU gives the integers of torch operations: tiles, networks, prior, on any number of threads."""

import subprocess
import sys

import numpy as np
import pytest

from deepsic_codec import config
from deepsic_codec.errors import ConfigurationError, CorruptPayload
from deepsic_codec.model.cpu import dot, transforms
from deepsic_codec.model.cpu import scheduler as scheduler_module
from deepsic_codec.model.cpu.scheduler import CpuScheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.payload.coders import symbols as coder
from deepsic_codec.payload.fields import Quantiser
from deepsic_codec.samples import drone_frame, eurosat_mosaic


@pytest.fixture(scope="module")
def engine():
    return CpuScheduler(find_model("base"))


@pytest.fixture(scope="module")
def plain():
    pytest.importorskip("torch")
    from deepsic_codec.model.runtime import LoadedModel
    from deepsic_codec.model.torch_scheduler import TorchScheduler

    return TorchScheduler(LoadedModel(find_model("base")))


@pytest.fixture(scope="module")
def images():
    """Chunks of odd sizes, of two slices, of one row, and in 64ths of a grey level."""
    frame, mosaic = drone_frame(), eurosat_mosaic()
    fractions = np.random.default_rng(0).integers(-31, 32, (70, 90, 3))
    q6 = np.clip(mosaic[:70, :90].astype(np.int16) * 64 + fractions, 0, 16320)
    return [
        frame[None, 200:350, 300:533],
        mosaic[None, :64, :64],
        np.stack([frame[:100, :81], frame[300:400, 500:581]]),
        frame[None, :1, :17],
        q6.astype(np.int16)[None],
    ]


QUALITIES = [50.0, 33.33, 77.5, 100.0, 1.0]


@pytest.mark.parametrize("inputs", [4, 120, 132])
def test_tiles_are_sums_of_products(inputs):
    rng = np.random.default_rng(inputs)
    rows = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), (dot.ROWS, inputs))
    weight = rng.choice([-127, -1, 0, 1, 127, 88], (dot.BLOCK, inputs))
    indices = np.flatnonzero(rng.random(inputs // dot.STEP) < 0.7).astype(np.int32)
    assert dot.wrong_tiles(rows, weight, indices) == []


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("taps", [1, 9, 36])
def test_rows_are_sums_of_products(groups, taps):
    rng = np.random.default_rng(taps)
    words = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), (3 * dot.POSITIONS + 50, 4))
    weight = rng.choice([-127, -1, 0, 1, 127, 88], (groups * dot.OUTPUTS, taps, 4))
    assert dot.wrong_rows(words, weight, rng.integers(0, 50, taps).astype(np.int32)) == []


def test_instructions_that_are_wrong_are_refused(monkeypatch):
    monkeypatch.setattr(dot, "plain_tile", lambda *arguments: np.zeros(dot.ROWS * dot.BLOCK))
    dot.check.cache_clear()
    with pytest.raises(ConfigurationError, match=r"\(dense, sparse, signed\); set DEEPSIC_KERNEL_LIBRARIES=none"):
        dot.check()


@pytest.mark.parametrize("effort", [0, 1, 2])
def test_results_are_those_of_torch(engine, plain, images, effort):
    some = slice(1, 4) if effort > 1 else slice(0, 5)
    chunks, qualities = images[some], QUALITIES[some]
    efforts = [effort] * len(chunks)
    one, other = (runtime.encode(chunks, qualities, efforts, symbols=True, pixels=True) for runtime in (engine, plain))
    for mine, theirs in zip(one, other, strict=True):
        assert (mine.features, mine.grid, mine.quantiser) == (theirs.features, theirs.grid, theirs.quantiser)
        for name in ("cells", "symbols", "pixels"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), strict=True)


def test_decoding_is_that_of_torch(engine, plain, images):
    encoded = engine.encode(images, QUALITIES, symbols=True)
    features, shapes = [one.features for one in encoded], [image.shape[:3] for image in images]
    quantisers = [one.quantiser for one in encoded]
    assert {trellis for _, trellis in quantisers} == {False, True}
    for q6 in ([False] * 5, [True] * 5):
        decoded = (runtime.decode(features, shapes, quantisers, q6) for runtime in (engine, plain))
        pairs = zip(*decoded, strict=True)
        for mine, theirs in pairs:
            np.testing.assert_array_equal(mine, theirs, strict=True)
    symbols = engine.decode_symbols(features, shapes, quantisers)
    for mine, theirs in zip(symbols, plain.decode_symbols(features, shapes, quantisers), strict=True):
        np.testing.assert_array_equal(mine, theirs, strict=True)
    scores = zip(*(runtime.score(symbols, shapes, quantisers) for runtime in (engine, plain)), strict=True)
    for mine, theirs in scores:
        np.testing.assert_array_equal(mine, theirs, strict=True)
    stored = [one.symbols for one in encoded]
    for runtime in (engine, plain):
        assert runtime.encode_symbols(stored, shapes, quantisers) == features
    for quantiser in quantisers:
        latents = engine.dequantise(stored[2], quantiser)
        np.testing.assert_array_equal(latents, plain.dequantise(stored[2], quantiser), strict=True)


def test_threads_and_parts_change_nothing(engine, monkeypatch):
    image, quality = drone_frame()[None, :450, :150], [60.0]
    (expected,) = engine.encode([image], quality, pixels=True)
    monkeypatch.setattr(scheduler_module, "HALOS", 1)  # smaller parts than are worth while
    for threads in (1, 2, 5):
        with config.set(threads=threads):
            (one,) = engine.encode([image], quality, pixels=True)
            (pixels,) = engine.decode([one.features], [image.shape[:3]], [one.quantiser])
        assert one.features == expected.features
        np.testing.assert_array_equal(one.cells, expected.cells)
        np.testing.assert_array_equal(one.pixels, expected.pixels)
        np.testing.assert_array_equal(pixels, expected.pixels)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_images_are_analysed_in_parts(engine, monkeypatch, threads):
    """Which changes no latent."""
    image = np.stack([drone_frame()[:608, 300:420], drone_frame()[300:908, :120]])
    expected = engine.analyse(image, 50)
    monkeypatch.setattr(transforms, "PART", 1)
    monkeypatch.setattr(transforms, "PART_HALOS", 1)
    calls = []
    run_blocks = transforms.run_blocks
    monkeypatch.setattr(transforms, "run_blocks", lambda *a: calls.append(a) or run_blocks(*a))
    with config.set(threads=threads):
        np.testing.assert_array_equal(engine.analyse(image, 50, threads), expected)
    assert len(calls) >= 32


def test_streams_that_outgrow_their_buffer(engine, images, monkeypatch):
    (expected,) = engine.encode(images[:1], [100.0])
    original = coder.SymbolEncoder.__init__

    def small(self, *arguments):
        original(self, *arguments)
        self._data = np.empty(1, np.uint8)

    monkeypatch.setattr(coder.SymbolEncoder, "__init__", small)
    assert engine.encode(images[:1], [100.0])[0].features == expected.features


def test_the_batch_after_a_damaged_stream_works(engine, images):
    features = [engine.encode(images[1:2], [50.0])[0].features] * 6
    settings = [(1, 64, 64)] * 6, [Quantiser(50.0, True)] * 6
    with config.set(threads=2), pytest.raises(CorruptPayload):
        engine.decode([*features[:4], features[0] + bytes(range(1, 41)), features[0]], *settings)
    assert len(engine.decode(features, *settings)) == 6


def test_other_instructions_give_the_same_tiles(tmp_path):
    """The instructions of any CPU, which are compiled in a process of their own."""
    code = """
        from deepsic_codec.model.cpu import dot
        dot.check()
        print(dot.VARIANT)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = ":".join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "generic\n"
