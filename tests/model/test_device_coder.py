"""The entropy coder for CUDA, compiled as C++ for one lane where there is a compiler: the same streams, both ways."""

import ctypes
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepsic_codec import config
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.model import torch_scheduler as schedulers
from deepsic_codec.model.device_coder import coder as device_coder
from deepsic_codec.model.device_coder import launch as launching
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.schedule import Step
from deepsic_codec.model.torch_scheduler import TorchScheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.payload.fields import Quantiser
from deepsic_codec.samples import drone_frame

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

BEFORE = """
struct int2 { int x, y; };
#define __device__
#define __global__
#define __forceinline__ inline
static thread_local int chunk_now;
#define CHUNK chunk_now
#define LANE 0
#define WARP 0
#define PREFETCH(pointer) (void)(pointer)
#define SYNC_WARP()
#define SHARED
#define READ(pointer) (*(pointer))
#define NEAR(pointer) (u8 *)(pointer)
#define EXTERN_SHARED(type, name) static thread_local type name[1 << 14]
struct int4 { int x, y, z, w; };
"""
AFTER = """
extern "C" void run(int kernel, const Job *job, int chunks) {
    void (*kernels[])(const Job) = {encode, decode, decode_trellis};
    for (chunk_now = 0; chunk_now < chunks; chunk_now++) kernels[kernel](*job);
}
"""


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "global"])
def launch(request, tmp_path_factory):
    """The launch of a GPU, on this CPU."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("coder")
    text = BEFORE + launching.source(320, request.param, lanes=1) + AFTER
    (folder / "coder.cpp").write_text(text)
    command = [COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", "-o", "coder.so", "coder.cpp"]
    subprocess.run(command, check=True, timeout=120, cwd=folder)
    library = ctypes.CDLL(str(folder / "coder.so"))

    def run(name, job, chunks, shared):
        library.run(("encode", "decode", "decode_trellis").index(name), ctypes.c_void_p(job.ctypes.data), chunks)

    return run


@pytest.fixture(scope="module")
def runtime():
    return TorchScheduler(LoadedModel(find_model("base"), "cpu"))


@pytest.fixture
def coder(runtime, launch):
    return device_coder.DeviceCoder(runtime.model.coder_tables, 320, torch.device("cpu"), launch)


def test_it_matches_the_host(coder, runtime):
    assert device_coder.matches_host(coder, runtime.model.coder_tables)


def crops(count, height=80, width=112):
    frame = drone_frame()
    return [frame[None, 70 * i : 70 * i + height, 90 * i : 90 * i + width] for i in range(count)]


@pytest.fixture(params=[0, 1], ids=["one by one", "ahead"])
def device_scheduler(request, runtime, coder, monkeypatch):
    """A scheduler whose device codes, with and without prefetch as on a GPU."""
    monkeypatch.setattr(TorchScheduler, "device_coder", lambda self, chunks: coder)
    monkeypatch.setattr(runtime, "_prefetch", request.param)
    with config.set(threads=1):
        yield runtime


@pytest.mark.parametrize("qualities", [[50.0] * 4, [5.0, 50.0, 95.0, 100.0]])
def test_a_scheduler_writes_and_reads_the_same(runtime, device_scheduler, monkeypatch, qualities):
    images = crops(4)
    shapes = [image.shape[:3] for image in images]
    result = device_scheduler.encode(images, qualities)
    features, quantisers = [one.features for one in result], [one.quantiser for one in result]
    pixels = device_scheduler.decode(features, shapes, quantisers)
    symbols = device_scheduler.decode_symbols(features, shapes, quantisers)
    monkeypatch.setattr(TorchScheduler, "device_coder", lambda self, chunks: None)
    expected = runtime.encode(images, qualities)
    assert features == [one.features for one in expected] and any(trellis for _, trellis in quantisers)
    for ours, theirs in zip(pixels, runtime.decode(features, shapes, quantisers), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(symbols, runtime.decode_symbols(features, shapes, quantisers), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_chunks_of_several_slices(runtime, device_scheduler, monkeypatch):
    stacks = [np.concatenate(crops(3)), np.concatenate(crops(3)[::-1])]
    shapes = [stack.shape[:3] for stack in stacks]
    result = device_scheduler.encode(stacks, [40.0, 60.0])
    arguments = [one.features for one in result], shapes, [one.quantiser for one in result]
    decoded = device_scheduler.decode(*arguments)
    monkeypatch.setattr(TorchScheduler, "device_coder", lambda self, chunks: None)
    expected = runtime.encode(stacks, [40.0, 60.0])
    assert [one.features for one in result] == [one.features for one in expected]
    for ours, theirs in zip(decoded, runtime.decode(*arguments), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_predictions_may_have_any_strides(coder):
    step = Step(0, 320, "1", (), 0), Step(0, 320, "2", ((0, -1),), 0)
    symbols = torch.from_numpy(np.random.default_rng(0).integers(-2, 3, (2, 4, 4, 320)).astype(np.int16))
    wide = [(torch.full((1, 320), m, dtype=torch.int16), torch.full((1, 320), 90, dtype=torch.uint8)) for m in (4, 9)]
    spread = [tuple(t.expand(16, -1) for t in pair) for pair in wide]
    plain = [tuple(t.contiguous() for t in pair) for pair in spread]
    assert coder.encode(step, symbols, 2, spread)() == coder.encode(step, symbols, 2, plain)()


def test_streams_longer_than_their_capacity(device_scheduler, runtime, monkeypatch):
    arguments = crops(2), [100.0, 100.0], [0, 0]
    expected = [one.features for one in device_scheduler.encode(*arguments)]
    monkeypatch.setattr(device_coder, "BYTES_PER_SYMBOL", 0)
    assert [one.features for one in device_scheduler.encode(*arguments)] == expected


@pytest.mark.parametrize("damage", ["cut", "longer", "noise", "flipped"])
@pytest.mark.parametrize("quality", [20.0, 80.0], ids=["scalar", "trellis"])
def test_damaged_streams_raise_the_host_s_errors(device_scheduler, runtime, monkeypatch, damage, quality):
    images, chance = crops(3), np.random.default_rng(0)
    shapes, qualities = [image.shape[:3] for image in images], [quality] * 3
    encoded = device_scheduler.encode(images, qualities)
    features, quantisers = [one.features for one in encoded], [one.quantiser for one in encoded]
    data = bytearray(features[1])
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "longer":
        data += b"12345678"
    elif damage == "noise":
        data = chance.bytes(len(data))
    else:
        data[len(data) // 3] ^= 0x55
    features[1] = bytes(data)
    outcomes = []
    for coder in (device_scheduler.device_coder(3), None):
        monkeypatch.setattr(TorchScheduler, "device_coder", lambda self, chunks, coder=coder: coder)
        try:
            decoded = runtime.decode(features, shapes, quantisers)
            outcomes.append([part.tobytes() for part in decoded])
        except CorruptPayload as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_streams_of_zeros(device_scheduler, runtime):
    grey = [np.full((1, 64, 64, 3), 128, np.uint8) for _ in range(2)]
    result = [one.features for one in device_scheduler.encode(grey, [20.0, 20.0])]
    assert result[0] == result[1] and len(result[0]) < 40
    np.testing.assert_array_equal(*device_scheduler.decode(result, [(1, 64, 64)] * 2, [Quantiser(20.0, False)] * 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("apart", [True, False], ids=["shared", "global"])
def test_a_gpu_writes_and_reads_the_same(runtime, monkeypatch, apart):
    monkeypatch.setattr(schedulers, "DEVICE_CODER_MIN_CHUNKS", 1)
    gpu = TorchScheduler(LoadedModel(find_model("base"), "cuda"))
    coder = gpu.device_coder(9)
    assert coder is not None
    monkeypatch.setattr(coder, "max_shared", coder.max_shared if apart else 0)
    images, qualities = crops(9), [50.0, 5.0, 95.0] * 3
    shapes = [image.shape[:3] for image in images]
    expected = runtime.encode(images, qualities)
    result = gpu.encode(images, qualities)
    assert [one.features for one in result] == [one.features for one in expected]
    assert all(np.array_equal(ours.cells, theirs.cells) for ours, theirs in zip(result, expected, strict=True))
    features, quantisers = [one.features for one in expected], [one.quantiser for one in expected]
    pairs = (one.decode(features, shapes, quantisers) for one in (gpu, runtime))
    for ours, theirs in zip(*pairs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(CorruptPayload):
        damaged = [*features[:4], features[4] + b"12345678", *features[5:]]
        gpu.decode(damaged, shapes, quantisers)


def test_devices_without_a_coder(runtime, monkeypatch, caplog):
    assert runtime.device_coder(1 << 20) is None
    arguments = runtime.model.coder_tables, 320, runtime.model.prior.steps
    assert device_coder.device_coder_for(*arguments, "cpu") is None
    with config.set(kernels="plain"):
        assert device_coder.device_coder_for(*arguments, "cuda") is None
    assert device_coder.device_coder_for(*arguments[:2], 3 * arguments[2], "cuda") is None  # more than a launch takes
    assert not caplog.text

    def broken(*_):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(launching, "fits_shared", broken)
    assert device_coder.device_coder_for(*arguments, "cuda") is None
    assert "no compiler found" in caplog.text


def test_other_streams_do_not_match(coder, runtime):
    other = device_coder.DeviceCoder(replace(runtime.model.coder_tables, rate=3), 320, coder.device, coder._launch)
    assert not device_coder.matches_host(other, runtime.model.coder_tables)
