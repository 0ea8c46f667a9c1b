import sys
from types import SimpleNamespace

import pytest

from deepsic_codec import config
from deepsic_codec.codec import core
from deepsic_codec.errors import ConfigurationError
from tests.common import check_rejects, run_python


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(config, "_settings", config.Settings())


def test_block_and_for_good():
    with config.set(device="cpu", threads=2) as settings:
        assert config.get() is settings and (settings.device, settings.threads) == ("cpu", 2)
        with config.set(threads=None):
            assert config.get().threads is None and config.get().device == "cpu"
        assert config.get().threads == 2
    assert config.get() == config.Settings()
    config.set(batch_pixels=7)
    assert config.get().batch_pixels == 7


def test_block_ends_after_an_error():
    with pytest.raises(KeyError), config.set(threads=5):
        raise KeyError
    assert config.get().threads is None


def test_a_call_takes_more_on_a_gpu_unless_told_how_much():
    assert config.Settings().pixels_per_call("cpu") == 1 << 21
    assert config.Settings().pixels_per_call("cuda") == 1 << 25
    for device, threads, pixels in (("cpu", 1, 1 << 21), ("cpu", 16, 1 << 24), ("cuda:1", 1, 1 << 28)):
        with config.set(device=device, threads=threads):
            assert core._limit() == pixels
    with config.set(device="cpu", threads=16, batch_pixels=9):
        assert core._limit() == 9
    assert {config.Settings(batch_pixels=9).pixels_per_call(kind) for kind in ("cpu", "cuda")} == {9}


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"gpu": 1}, "no setting gpu|device"),
        ({"threads": 0}, "threads|0"),
        ({"threads": "2"}, "threads|'2'"),
        ({"batch_pixels": 0}, "batch_pixels|0"),
        ({"max_pixels": None}, "max_pixels|None"),
        ({"batch_pixels": True}, "batch_pixels"),
        ({"device": ""}, "device"),
        ({"kernels": True}, "kernels|auto or plain"),
        ({"device": None}, "device"),
    ],
    ids=str,
)
def test_bad_settings_change_nothing(changes, words):
    check_rejects(ConfigurationError, words, config.set, **({"device": "cpu"} | changes))
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


def test_environment():
    show = "from deepsic_codec import config; print(config.get())"
    assert run_python(show, DEEPSIC_DEVICE="cuda:1", DEEPSIC_THREADS="3", DEEPSIC_BATCH_PIXELS=" 9 ").strip() == (
        "Settings(device='cuda:1', batch_pixels=9, threads=3, precision='auto', max_pixels=536870912, kernels='auto')"
    )
    assert "kernels='plain'" in run_python(show, DEEPSIC_KERNELS="plain")
    with pytest.raises(AssertionError, match="threads: expected an integer of at least 1, got 'many'"):
        run_python(show, DEEPSIC_THREADS="many")
