import asyncio
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import dask.array as da
import numpy as np
import pytest

from deepsic_codec import DeepSIC, config, create_array
from deepsic_codec import dask as bulk
from deepsic_codec.codec.batching import batch_limit
from deepsic_codec.errors import ConfigurationError, MissingPackage, UnsupportedArray, UnsupportedPayload
from deepsic_codec.io.preview import preview
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.zoo import find_model
from tests.common import check_rejects, photograph, run_python


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Defaults without environment, and afterwards those of before."""
    before = config.get()
    with config.set():
        config.set_defaults(**asdict(config.Settings()))
        yield
    config.set_defaults(**asdict(before))


def in_thread(function, *arguments):
    """What a function returns in a new thread, which has no context of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result(30)


def test_block():
    with config.set(device="cpu", threads=2) as settings:
        assert config.get() == settings and (settings.device, settings.threads) == ("cpu", 2)
        with config.set(threads=None):
            assert config.get().threads is None and config.get().device == "cpu"
        assert config.get().threads == 2
    assert config.get() == config.Settings()


def test_without_a_block_settings_stay_in_this_thread():
    with config.set(threads=3):
        config.set(batch_pixels=7)
        assert (config.get().batch_pixels, config.get().threads) == (7, 3)
        assert in_thread(config.get) == config.Settings()
    assert config.get() == config.Settings(), "the block ends what began in it"


def test_defaults_are_those_of_all_threads():
    config.set_defaults(batch_pixels=7, threads=5)
    assert config.get() == in_thread(config.get) == config.Settings(batch_pixels=7, threads=5)
    with config.set(threads=1):
        config.set_defaults(threads=9)
        assert config.get() == config.Settings(batch_pixels=7, threads=1)
        assert in_thread(config.get).threads == 9


def test_no_thread_sees_another_ones_block():
    stop, seen = threading.Event(), set()

    def look():
        while not stop.is_set():
            seen.add(config.get())

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(3000):
        with config.set(max_pixels=1 << 10):
            pass
    stop.set()
    thread.join()
    assert seen == {config.Settings()}


def test_blocks_of_threads_overlap():
    begun, go_on = threading.Event(), threading.Event()

    def other():
        with config.set(threads=1):
            begun.set()
            go_on.wait(20)
            return config.get()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(other)
        begun.wait(20)
        with config.set(max_pixels=1 << 10):
            go_on.set()
            assert future.result(20) == config.Settings(threads=1)
            assert config.get() == config.Settings(max_pixels=1 << 10)
    assert config.get() == config.Settings()


def test_tasks_of_asyncio_keep_their_blocks():
    """Tasks of one thread take turns within their blocks, and threads that they start inherit them."""

    async def task(number):
        with config.set(threads=number, max_pixels=1 << number):
            for _ in range(5):
                await asyncio.sleep(0)
                assert config.get() == config.Settings(threads=number, max_pixels=1 << number)
            return (await asyncio.to_thread(config.get)).threads

    async def gather():
        with config.set(batch_pixels=7):
            inside = asyncio.create_task(asyncio.to_thread(config.get))
        numbers = await asyncio.gather(*map(task, range(1, 20)))
        assert (await inside).batch_pixels == 7 and config.get() == config.Settings()
        return numbers

    assert asyncio.run(gather()) == list(range(1, 20))
    assert config.get() == config.Settings()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("way", ["zarr", "dask", "our dask", "batch", "preview"])
def test_settings_reach_the_threads_that_serve_a_call(stub, tmp_path, zarr_format, way):
    store = str(tmp_path / "a.zarr")
    array = create_array(
        store, name="a", data=np.ones((128, 128, 3), "u1"), chunks=(32, 32, 3), zarr_format=zarr_format
    )
    seen = set()
    stub.delay = lambda: seen.add(config.get())
    reads = {
        "zarr": lambda: array[:],
        "dask": lambda: da.from_array(array, chunks=(32, 32, 3)).compute(scheduler="threads", num_workers=3),
        "our dask": lambda: bulk.open(store, "a", batch_size=4).compute(scheduler="threads", num_workers=3),
        "batch": lambda: DeepSIC().decode_batch([DeepSIC().encode(np.ones((9, 9, 3), "u1"))] * 3),
        "preview": lambda: preview(array),
    }
    with config.set(batch_pixels=3000, threads=2):
        reads[way]()
        assert seen == {config.Settings(batch_pixels=3000, threads=2)}
        with config.set(max_pixels=1 << 10), pytest.raises((UnsupportedPayload, UnsupportedArray)):
            reads[way]()


def test_callers_that_share_a_batcher_keep_their_settings(stub):
    """Whoever leads runs the jobs of others with the settings of those."""
    payload = DeepSIC().encode(np.ones((9, 9, 3), "u1"))
    seen, lock = [], threading.Lock()

    def look():
        with lock:
            seen.append(config.get().threads)
        time.sleep(0.01)

    def decode(threads):
        with config.set(threads=threads):
            DeepSIC().decode_batch([payload])

    stub.delay = look
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [1, 2] * 8))
    jobs = list(zip(seen, stub.sizes("decode"), strict=True))
    assert {threads: sum(size for t, size in jobs if t == threads) for threads in (1, 2)} == {1: 8, 2: 8}


def test_block_ends_after_an_error():
    with pytest.raises(KeyError), config.set(threads=5):
        raise KeyError
    assert config.get().threads is None


def test_a_call_takes_more_on_a_gpu_unless_told_how_much():
    assert config.Settings().pixels_per_call("cpu") == 1 << 21
    assert config.Settings().pixels_per_call("cuda") == 1 << 25
    for device, threads, pixels in (("cpu", 1, 1 << 21), ("cpu", 16, 1 << 24), ("cuda:1", 1, 1 << 28)):
        with config.set(device=device, threads=threads):
            assert batch_limit() == pixels
    with config.set(device="cpu", threads=16, batch_pixels=9):
        assert batch_limit() == 9
    assert {config.Settings(batch_pixels=9).pixels_per_call(kind) for kind in ("cpu", "cuda")} == {9}


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"gpu": 1}, "unknown setting gpu|device"),
        ({"threads": 0}, "threads|0"),
        ({"threads": "2"}, "threads|'2'"),
        ({"batch_pixels": 0}, "batch_pixels|0"),
        ({"max_pixels": None}, "max_pixels|None"),
        ({"batch_pixels": True}, "batch_pixels"),
        ({"device": ""}, "device"),
        ({"kernels": True}, "kernels|auto, plain"),
        ({"device": None}, "device"),
        ({"model_path": 3}, "model_path|3"),
        ({"model_path": ["a", None]}, "model_path"),
        ({"cache": ""}, "cache|folder"),
    ],
    ids=str,
)
def test_bad_settings_change_nothing(changes, words):
    for change in (config.set, config.set_defaults):
        check_rejects(ConfigurationError, words, change, **({"device": "cpu"} | changes))
    assert config.get() == config.Settings()


def test_the_device_in_use_is_asked_of_torch_where_that_is_there(monkeypatch):
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert config.device_in_use() == "cuda"
    with config.set(device="cuda:1"):
        assert config.device_in_use() == "cuda:1"
    torch.cuda.is_available = lambda: False
    assert config.device_in_use(loading=True) == "cpu"
    monkeypatch.setitem(sys.modules, "torch", None)  # neither imported nor to be
    assert config.device_in_use() == config.device_in_use(loading=True) == "cpu"


@pytest.mark.parametrize(("driver", "device"), [(True, "cuda"), (False, "cpu")])
def test_torch_is_imported_only_where_a_gpu_may_be(monkeypatch, driver, device):
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(config, "import_module", lambda name: monkeypatch.setitem(sys.modules, name, torch))
    monkeypatch.setattr(config, "_has_gpu_driver", lambda: driver)
    assert config.device_in_use() == "cpu"
    assert config.device_in_use(loading=True) == device


@pytest.mark.parametrize(
    ("device", "family", "words"),
    [("cuda:1", "deepsic", "the device 'cuda:1'"), ("cpu", "paper", "the family 'paper'")],
)
def test_what_needs_torch_says_so(monkeypatch, device, family, words):
    monkeypatch.setattr("deepsic_codec.require.find_spec", lambda name: None)
    info = replace(find_model(), architecture={"family": family}, encoder="none of another test")
    with config.set(device=device):
        check_rejects(MissingPackage, f"{words} needs the package torch|deepsic-codec[torch]", get_scheduler, info)


def test_an_effort_that_needs_torch_says_so(monkeypatch):
    monkeypatch.setattr("deepsic_codec.require.find_spec", lambda name: None)
    codec = DeepSIC(transform="features", effort=2, tune="ms-ssim")
    check_rejects(
        MissingPackage, "effort=2 needs the package torch|deepsic-codec[torch]", codec.encode, photograph(64, 64, 3)
    )


def test_folders():
    paths = config.Settings(model_path=os.pathsep.join(["a", "", "b"]), cache=Path("c"))
    assert (paths.model_path, paths.cache) == (("a", "b"), "c")
    assert config.Settings(model_path=[Path("a")]).model_path == config.Settings(model_path=Path("a")).model_path


def test_environment():
    code = """
        from deepsic_codec import config
        assert config.get() == config.Settings(
            device="cuda:1", batch_pixels=9, threads=3, kernels="plain", model_path=("/a", "/b"), cache="/c"
        ), config.get()
    """
    environment = {"DEVICE": "cuda:1", "THREADS": "3", "BATCH_PIXELS": " 9 ", "KERNELS": " plain", "PRECISION": ""}
    environment |= {"MODEL_PATH": os.pathsep.join(["/a", "/b"]), "CACHE": "/c", "UNKNOWN": "1"}
    run_python(code, **{f"DEEPSIC_{name}": value for name, value in environment.items()})
    with pytest.raises(AssertionError, match="threads: expected an integer of at least 1, got 'many'"):
        run_python("from deepsic_codec import config; config.get()", DEEPSIC_THREADS="many")


def test_configuration_file(tmp_path):
    (tmp_path / "deepsic.yaml").write_text("threads: 3\nmax_pixels: 4096\nmodel_path: [/a]\n")
    code = """
        from deepsic_codec import config
        assert config.get() == config.Settings(threads=5, max_pixels=4096, model_path=("/a",)), config.get()
    """
    run_python(code, DEEPSIC_CONFIG=str(tmp_path), DEEPSIC_THREADS="5")
