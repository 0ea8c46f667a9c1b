"""Each helper of tests/common.py fails for something wrong."""

import zlib

import numpy as np
import pytest

from tests.common import (
    check_config,
    check_lazy,
    check_rejects,
    check_repr,
    check_roundtrip,
    photograph,
    psnr,
    run_python,
)


class Toy:
    """A codec with switches for its faults."""

    codec_id = "toy"

    def __init__(self, level=1, **faults):
        self.level, self.faults = level, faults

    def __eq__(self, other):
        return self.level == other.level

    def __hash__(self):
        return hash(self.level)

    def __repr__(self):
        return f"Toy({self.faults.get('shown', self.level)})"

    def get_config(self):
        return {"id": "toy", "level": self.faults.get("written", self.level)}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __reduce__(self):
        return type(self), (self.level + len(self.faults.get("pickle", "")),)

    def encode(self, array):
        self.shape, self.dtype, self.order = array.shape, array.dtype, "C"
        if array.flags.f_contiguous and not array.flags.c_contiguous:
            self.order = "F"
        payload = zlib.compress(array.tobytes(self.order))
        if self.faults.get("mutate"):
            array[...] = 0
        return bytearray(payload) if self.faults.get("bytearray") else payload

    def decode(self, payload, out=None):
        order = self.faults.get("order", self.order)
        array = np.frombuffer(zlib.decompress(payload), self.dtype).reshape(self.shape, order=order).copy(order=order)
        array = array + np.array(self.faults.get("add", 0), "u1")
        array = array.astype(self.faults.get("dtype", "u1"))
        if out is None:
            return array
        target = np.frombuffer(out, "u1") if isinstance(out, bytearray) else out
        if self.faults.get("scramble"):
            target.reshape(-1)[:] = array.reshape(-1)[::-1]
        elif not self.faults.get("no_out"):
            target[...] = array.reshape(-1, order="A") if target.ndim == 1 else array
        return out


ARRAYS = [photograph(4, 5, 3), np.asfortranarray(photograph(4, 5, 3))]


@pytest.mark.parametrize("array", ARRAYS, ids="CF")
def test_check_roundtrip(array):
    check_roundtrip(Toy(), array)
    check_roundtrip(Toy(add=1), array, decibels=30)
    for fault in ({"add": 1}, {"mutate": 1}, {"bytearray": 1}, {"dtype": "i2"}, {"no_out": 1}, {"scramble": 1}):
        with pytest.raises(AssertionError):
            check_roundtrip(Toy(**fault), array.copy(order="K"))
    with pytest.raises(AssertionError):
        check_roundtrip(Toy(add=100), array, decibels=30)
    with pytest.raises(AssertionError):
        check_roundtrip(Toy(order="C" if array.flags.f_contiguous else "F"), array)


def test_check_config():
    check_config(Toy(3))
    with pytest.raises(AssertionError):
        check_config(Toy(3, written=4))
    with pytest.raises(AssertionError):
        check_config(Toy(3, pickle="1"))
    with pytest.raises(TypeError):
        check_config(Toy(3, written=np.float32(3)))


def test_check_repr():
    check_repr(Toy(3))
    with pytest.raises(AssertionError):
        check_repr(Toy(3, shown=2))


def test_check_rejects():
    assert check_rejects(ValueError, "invalid|'x'", int, "x").startswith("invalid")
    for error, words in ((ValueError, "other"), (Exception, "invalid")):
        with pytest.raises(AssertionError):
            check_rejects(error, words, int, "x")
    with pytest.raises(pytest.fail.Exception):
        check_rejects(ValueError, "", int, "1")


def test_check_lazy():
    assert check_lazy("print(1)", unwanted=("json",)) == "1\n"
    with pytest.raises(AssertionError, match="json"):
        check_lazy("import json", unwanted=("json",))


def test_run_python():
    assert run_python("import os; print(os.environ['A'])", A="b") == "b\n"
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_python("1 / 0")


def test_psnr():
    assert psnr(ARRAYS[0], ARRAYS[0]) == np.inf
    assert psnr(np.zeros(9, "u1"), np.full(9, 255, "u1")) == 0
