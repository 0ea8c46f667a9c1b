"""Triton's kernels: on CUDA where there is one, otherwise in Triton's interpreter, which needs no GPU."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
pytest.importorskip("triton")

from deepsic_codec import config
from deepsic_codec.model.exact import layers, prior, transforms
from deepsic_codec.model.ops import select
from deepsic_codec.model.ops.triton import TritonOps
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.torch_scheduler import TorchScheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import drone_frame

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHECKS = list(select.checks(TritonOps(), DEVICE))


@pytest.mark.parametrize("same", [same for _, same in CHECKS], ids=[name for name, _ in CHECKS])
def test_each_gives_the_integers_of_tensor_operations(same):
    assert same()


@pytest.fixture
def untried():
    """What was found out about devices is forgotten, before and after."""
    select._triton.cache_clear()
    yield
    select._triton.cache_clear()


def test_a_wrong_integer_is_noticed(monkeypatch, caplog, untried):
    class Wrong(TritonOps):
        def read(self, values, bits):
            out = super().read(values, bits)
            out[-1, -1] ^= 1
            return out

    wrong = [name for name, same in select.checks(Wrong(), DEVICE) if not same()]
    assert wrong == ["read", "read rounded down"]
    monkeypatch.setattr("deepsic_codec.model.ops.triton.TritonOps", Wrong)
    assert select._triton(DEVICE) is None
    assert "read rounded down" in caplog.text


def test_what_fails_to_compile_is_done_without(monkeypatch, caplog, untried):
    class Broken(TritonOps):
        def digits(self, values, unit=None):
            raise RuntimeError("ptxas is not there")

    monkeypatch.setattr("deepsic_codec.model.ops.triton.TritonOps", Broken)
    assert select._triton(DEVICE) is None
    assert "ptxas is not there" in caplog.text


def test_who_gets_them(monkeypatch):
    kernels = TritonOps()
    monkeypatch.setattr(select, "_triton", lambda device: kernels)
    assert select.ops_for("cpu") is select.TORCH
    assert select.ops_for("cuda:0") is kernels and select.ops_for("meta") is select.TORCH
    with config.set(kernels="plain"):
        assert select.ops_for("cuda:0") is select.TORCH


@pytest.fixture(scope="module")
def runtimes():
    """One with kernels, one without."""
    plain = TorchScheduler(LoadedModel(find_model("base"), "cpu"))
    if DEVICE.type == "cuda":
        yield TorchScheduler(LoadedModel(find_model("base"), "cuda")), plain
        return
    # the interpreter runs one kernel at a time
    kernels = TritonOps()
    with config.set(threads=1), pytest.MonkeyPatch.context() as patch:
        for module in (layers, prior, transforms):
            patch.setattr(module, "ops_for", lambda device: kernels)
        yield TorchScheduler(LoadedModel(find_model("base"), "cpu")), plain


def test_payloads_and_pixels_are_those_of_a_cpu(runtimes):
    frame, (fused, plain) = drone_frame(), runtimes
    images = [frame[None, 70 * i : 70 * i + 64, 90 * i : 90 * i + 80] for i in range(3)] + [frame[None, :40, :50]]
    images.append((images[3].astype(np.int16) * 64 + 5 * (images[3] < 255)).astype(np.int16))
    qualities, q6 = [50.0, 22.5, 90.0, 50.0, 70.0], [False, True, False, False, True]
    shapes = [image.shape[:3] for image in images]
    expected = plain.encode(images, qualities)
    actual = fused.encode(images, qualities)
    for a, b in zip(actual, expected, strict=True):
        assert a.features == b.features and np.array_equal(a.cells, b.cells)
    streams, quantisers = [one.features for one in expected], [one.quantiser for one in expected]
    decoded = zip(*(r.decode(streams, shapes, quantisers, q6) for r in (fused, plain)), strict=True)
    assert all(np.array_equal(a, b) for a, b in decoded)
    assert [one.features for one in fused.encode(images[:2], [50.0, 50.0])] == [
        one.features for one in plain.encode(images[:2], [50.0, 50.0])
    ]
