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
from deepsic_codec.model.ops import select as passes
from deepsic_codec.model.ops.tensor_ops import Compiled, Tensors
from deepsic_codec.model.ops.triton import Fused
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.scheduler import Scheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import drone_frame

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHECKS = list(passes.checks(Fused, DEVICE))


@pytest.mark.parametrize("same", [same for _, same in CHECKS], ids=[name for name, _ in CHECKS])
def test_each_gives_the_integers_of_tensor_operations(same):
    assert same()


@pytest.fixture
def untried():
    """What was found out about devices is forgotten, before and after."""
    passes._fused.cache_clear()
    yield
    passes._fused.cache_clear()


def test_a_wrong_integer_is_noticed(monkeypatch, caplog, untried):
    class Wrong(Fused):
        @staticmethod
        def read(values, bits):
            out = Fused.read(values, bits)
            out[-1, -1] ^= 1
            return out

    wrong = [name for name, same in passes.checks(Wrong, DEVICE) if not same()]
    assert wrong == ["read", "read as it is"]
    monkeypatch.setattr("deepsic_codec.model.ops.triton.Fused", Wrong)
    assert passes._fused(DEVICE) is None
    assert "read as it is" in caplog.text


def test_what_fails_to_compile_is_done_without(monkeypatch, caplog, untried):
    class Broken(Fused):
        @staticmethod
        def digits(values, unit=None):
            raise RuntimeError("ptxas is not there")

    monkeypatch.setattr("deepsic_codec.model.ops.triton.Fused", Broken)
    assert passes._fused(DEVICE) is None
    assert "ptxas is not there" in caplog.text


def test_who_gets_them(monkeypatch):
    monkeypatch.setattr(passes, "_fused", lambda device: Fused)
    assert passes.passes_on("cpu") is Compiled and passes.fused_on("cpu") is None
    assert passes.passes_on("cuda:0") is Fused and passes.passes_on("meta") is Tensors
    with config.set(kernels="plain"):
        assert passes.passes_on("cuda:0") is Tensors and passes.fused_on("cuda:0") is None


@pytest.fixture(scope="module")
def runtimes():
    """One with kernels, one without."""
    plain = Scheduler(LoadedModel(find_model("base"), "cpu"))
    if DEVICE.type == "cuda":
        yield Scheduler(LoadedModel(find_model("base"), "cuda")), plain
        return
    # the interpreter runs one kernel at a time
    with config.set(threads=1), pytest.MonkeyPatch.context() as patch:
        for module in (layers, prior, transforms):
            patch.setattr(module, "passes_on", lambda device: Fused)
            patch.setattr(module, "fused_on", lambda device: Fused, raising=False)
        yield Scheduler(LoadedModel(find_model("base"), "cpu")), plain


def test_payloads_and_pixels_are_those_of_a_cpu(runtimes):
    frame, (fused, plain) = drone_frame(), runtimes
    images = [frame[None, 70 * i : 70 * i + 64, 90 * i : 90 * i + 80] for i in range(3)] + [frame[None, :40, :50]]
    images.append((images[3].astype(np.int16) * 64 + 5 * (images[3] < 255)).astype(np.int16))
    qualities, fine = [50.0, 22.5, 90.0, 50.0, 70.0], [False, True, False, False, True]
    shapes = [image.shape[:3] for image in images]
    wanted = plain.encode(images, qualities)
    found = fused.encode(images, qualities)
    for a, b in zip(found, wanted, strict=True):
        assert a.features == b.features and np.array_equal(a.cells, b.cells)
    streams = [one.features for one in wanted]
    decoded = zip(*(r.decode(streams, shapes, qualities, fine) for r in (fused, plain)), strict=True)
    assert all(np.array_equal(a, b) for a, b in decoded)
    assert [one.features for one in fused.encode(images[:2], [50.0, 50.0])] == [
        one.features for one in plain.encode(images[:2], [50.0, 50.0])
    ]
