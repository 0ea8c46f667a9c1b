"""Copies, streams and pipelines of a device: nothing waits too early, and a CPU copies nothing."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepsic_codec import config
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.model import coding, device, threads
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.torch_scheduler import TorchScheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import drone_frame


@pytest.fixture(scope="module")
def runtime():
    return TorchScheduler(LoadedModel(find_model("base"), "cpu"))


def crops(count):
    frame = drone_frame()
    return [frame[None, 70 * i : 70 * i + 64, 90 * i : 90 * i + 80] for i in range(count)]


def test_cpu_upload_and_download_copy_nothing():
    values = np.arange(6, dtype=np.int16).reshape(2, 3)
    tensor = device.upload(values, "cpu")
    assert np.shares_memory(tensor.numpy(), values) and np.shares_memory(device.download(tensor)(), values)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 9])
def test_pipelined_waits_after_prefetch_further_items(prefetch):
    log = []

    def started():
        for i in range(4):
            log.append(("begin", i))
            yield i, lambda i=i: log.append(("finish", i)) or i * i

    assert list(threads.pipelined(started(), prefetch)) == [(i, i * i) for i in range(4)]
    for i in range(4):
        before = [k for what, k in log[: log.index(("finish", i))] if what == "begin"]
        assert before == list(range(min(4, i + prefetch + 1)))


@pytest.mark.parametrize("prefetch", [1, 2])
def test_prefetch_does_not_change_results(runtime, monkeypatch, prefetch):
    images, qualities = crops(5), [50.0, 50.0, 20.0, 90.0, 50.0]
    shapes = [image.shape[:3] for image in images]
    with config.set(batch_pixels=2 * 64 * 80):
        expected = runtime.encode(images, qualities)
        monkeypatch.setattr(runtime, "_prefetch", prefetch)
        encoded = runtime.encode(images, qualities)
        assert [one.features for one in encoded] == [one.features for one in expected]
        assert all(np.array_equal(a.cells, b.cells) for a, b in zip(encoded, expected, strict=True))
        arguments = [one.features for one in encoded], shapes, [one.quantiser for one in encoded]
        ahead = runtime.decode(*arguments)
        monkeypatch.setattr(runtime, "_prefetch", 0)
        plain = runtime.decode(*arguments)
    assert all(np.array_equal(a, b) for a, b in zip(ahead, plain, strict=True))


def test_decoding_two_groups_concurrently(runtime, monkeypatch):
    images, qualities = crops(5), [50.0, 50.0, 20.0, 90.0, 50.0]
    shapes = [image.shape[:3] for image in images]
    chunks = runtime.encode(images, qualities)
    streams, quantisers = [one.features for one in chunks], [one.quantiser for one in chunks]
    expected = runtime.decode(streams, shapes, quantisers)
    monkeypatch.setattr(runtime, "_prefetch", 1)
    with ThreadPoolExecutor(2) as pool, config.set(batch_pixels=64 * 80, threads=1):
        monkeypatch.setattr(runtime, "_decode_pool", pool)
        encoded = runtime.decode(streams, shapes, quantisers)
        with pytest.raises(CorruptPayload):
            runtime.decode([*streams[:3], streams[3] + b"12345678", streams[4]], shapes, quantisers)
    assert all(np.array_equal(a, b) for a, b in zip(encoded, expected, strict=True))
    # a pool that refuses work, as while the interpreter shuts down
    again = runtime.decode(streams, shapes, quantisers)
    assert all(np.array_equal(a, b) for a, b in zip(again, expected, strict=True))


def test_pipelined_waits_for_all_items_after_an_error():
    log = []

    def fails():
        raise MemoryError("no more of it")

    def started():
        yield 0, fails
        yield 1, lambda: log.append(1)
        yield 2, fails

    with pytest.raises(MemoryError):
        list(threads.pipelined(started(), 1))
    assert log == [1]


def test_calls_run_once_where_a_pool_can_start_no_thread(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    ran, free = [], threading.Event()
    with ThreadPoolExecutor(4) as pool:
        slow = pool.submit(free.wait, 60)  # on the only thread
        monkeypatch.setattr(threading.Thread, "start", refuse)
        one = threads.submit(pool, lambda: ran.append("one") or 1)
        rest = threads.submit_each(pool, lambda i: ran.append(i) or i, 3)
        free.set()
        assert one() == 1 and rest() == [0, 1, 2] and slow.result()
    assert sorted(map(str, ran)) == ["0", "1", "2", "one"]
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError):  # a pool that takes nothing
        threads.submit(pool, lambda: 1 / 0)()


def test_threads_of_a_pool_have_the_settings_of_the_caller():
    with ThreadPoolExecutor(1) as pool, config.set(batch_pixels=77):
        one = threads.submit(pool, lambda: config.get().batch_pixels)
        each = threads.submit_each(pool, lambda i: config.get().batch_pixels + i, 2)
        assert one() == 77 and each() == [77, 78]
    with ThreadPoolExecutor(1) as pool:
        assert threads.submit_each(pool, lambda i: config.get().batch_pixels, 1)() == [None]


def test_stack_padded_repeats_edges():
    images = [np.random.default_rng(i).integers(0, 256, (2, 5, 7, 3), np.uint8) for i in range(3)]
    joined = device.stack_padded(images, 4, "cpu")
    padded = np.pad(np.concatenate(images), ((0, 0), (0, 3), (0, 1), (0, 0)), mode="edge")
    assert joined.dtype == torch.uint8 and np.array_equal(joined.numpy(), padded)
    whole = device.stack_padded([images[0][:, :4, :4].astype(np.int16)], 4, "cpu")
    assert whole.dtype == torch.int16 and np.array_equal(whole.numpy(), images[0][:, :4, :4])


def test_pieces_of_one_chunk_keep_their_order(runtime, monkeypatch):
    slices = np.concatenate(crops(3))
    (encoded,) = runtime.encode([slices], [60.0])
    arguments = [encoded.features], [slices.shape[:3]], [encoded.quantiser]
    expected = runtime.decode(*arguments)
    monkeypatch.setattr(runtime, "_prefetch", 1)
    with config.set(batch_pixels=64 * 80):
        assert runtime.encode([slices], [60.0])[0].features == encoded.features
        assert np.array_equal(runtime.decode(*arguments)[0], expected[0])


def test_start_encoding_does_not_wait_for_the_device(runtime, monkeypatch):
    waited = []

    def slow(tensor):
        return lambda: waited.append(1) or tensor.numpy()

    encoded = runtime.encode(crops(2), [50.0, 50.0], symbols=True)
    symbols = np.concatenate([one.symbols for one in encoded])
    expected = coding.encode_symbols(
        runtime.model.prior, runtime.model.coder_tables, np.split(symbols, 2), [50.0, 50.0]
    )
    monkeypatch.setattr(coding, "download", slow)
    with torch.inference_mode():
        rest = coding.start_encoding(
            runtime.model.prior, runtime.model.coder_tables, torch.from_numpy(symbols), 2, [50.0, 50.0]
        )
    assert not waited
    assert rest() == expected and waited


def test_encodings_of_one_shape_that_are_in_flight_together(runtime):
    """One started last may be waited for first, and with more chunks."""
    model, encoded = runtime.model, runtime.encode(crops(3), [50.0] * 3, symbols=True)
    symbols = [torch.from_numpy(one.symbols) for one in encoded]
    with torch.inference_mode():
        waits = [
            coding.start_encoding(
                model.prior, model.coder_tables, torch.cat(part), len(part), [50.0] * len(part), trellis=True
            )
            for part in (symbols[:1], symbols, symbols[1:])
        ]
        features = [wait() for wait in waits]
    expected = [one.features for one in encoded]
    assert features == [expected[:1], expected, expected[1:]]


class FakeTorch:
    """The parts of torch that copies to CUDA use. A copy arrives when its event is waited for, no sooner."""

    def __init__(self):
        self.log, self.pending, self.stream_now = [], [], "work"
        here = SimpleNamespace(name="work", wait_stream=lambda other: self.log.append(("waits for", other.name)))
        self.cuda = SimpleNamespace(
            Event=lambda blocking: SimpleNamespace(record=lambda stream: None, synchronize=self.arrive),
            Stream=lambda where: SimpleNamespace(name="copies"),
            current_stream=lambda where: here,
            stream=self.on,
        )
        self.device = lambda name: SimpleNamespace(type=str(name).split(":")[0])

    def arrive(self):
        for copy in self.pending:
            copy()
        self.pending.clear()

    @contextlib.contextmanager
    def on(self, stream):
        self.stream_now = stream.name
        yield
        self.stream_now = "work"

    def empty(self, shape, dtype, pin_memory):
        assert pin_memory
        host = np.full(shape, -1, dtype)

        def copy_(source, non_blocking):
            assert non_blocking
            self.pending.append(lambda: host.__setitem__(..., source.values))

        return SimpleNamespace(copy_=copy_, numpy=lambda: host)

    def as_tensor(self, values):
        if isinstance(values, SimpleNamespace):
            return values

        def to(device, non_blocking):
            assert non_blocking
            self.log.append(("copied on", self.stream_now))
            return SimpleNamespace(record_stream=lambda stream: self.log.append(("kept for", stream.name)))

        pinned = SimpleNamespace(to=to)
        return SimpleNamespace(device=self.device("cpu"), pin_memory=lambda: self.log.append("pinned") or pinned)


def test_high_priority_stream_of_each_thread(monkeypatch):
    made = []
    cuda = SimpleNamespace(
        Stream=lambda where, priority: made.append((where, priority)) or len(made), stream=lambda stream: stream
    )
    monkeypatch.setattr(device, "torch", SimpleNamespace(cuda=cuda, device=torch.device))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        streams = [pool.submit(device.high_priority_stream, "cuda:0").result() for pool in (one, one, other)]
    assert streams == [1, 1, 2] and made == [(torch.device("cuda:0"), -1)] * 2
    with device.high_priority_stream("cpu"):
        assert len(made) == 2


@pytest.fixture
def fake(monkeypatch):
    torch = FakeTorch()
    monkeypatch.setattr(device, "torch", torch)
    monkeypatch.setattr(device, "_copy_stream", torch.cuda.Stream)
    return torch


def test_download_from_cuda_waits_when_called(fake):
    tensor = SimpleNamespace(device=fake.device("cuda:0"), shape=(3,), dtype=np.int16, values=[1, 2, 3])
    array = device.download(tensor)
    assert fake.pending
    assert array().tolist() == [1, 2, 3]


def test_upload_of_a_cuda_tensor_copies_nothing(fake):
    on_cuda = SimpleNamespace(device=fake.device("cuda:0"), to=lambda where: on_cuda)
    assert device.upload(on_cuda, "cuda:0") is on_cuda and not fake.log


def test_upload_to_cuda_is_pinned_and_on_the_copy_stream(fake):
    device.upload(np.zeros(3), "cuda")
    assert fake.log == ["pinned", ("copied on", "copies"), ("waits for", "copies"), ("kept for", "work")]


@pytest.mark.parametrize("after", [True, False])
def test_side_stream_waits_and_is_waited_for(monkeypatch, after):
    log = []

    def stream(name):
        return SimpleNamespace(name=name, wait_stream=lambda other: log.append(f"{name} waits for {other.name}"))

    here, now = stream("work"), []

    @contextlib.contextmanager
    def on(one):
        now.append(one.name)
        yield
        now.pop()

    cuda = SimpleNamespace(current_stream=lambda where: here, stream=on)
    monkeypatch.setattr(device, "torch", SimpleNamespace(cuda=cuda, device=torch.device))
    monkeypatch.setattr(device, "_side_streams", lambda where: iter([stream("aside")]))
    tensor = SimpleNamespace(record_stream=lambda one: log.append(f"kept for {one.name}"))
    with device.side_stream("cuda:0", after) as ready:
        assert now == ["aside"] and log == ["aside waits for work"] * after
    log.clear()
    assert ready(tensor) is tensor and not now and log == ["work waits for aside", "kept for work"]
    with device.current_stream_context("cuda:0")():
        assert now == ["work"]
    with device.side_stream("cpu") as ready, device.current_stream_context("cpu")():
        assert ready(tensor) is tensor
