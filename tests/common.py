"""Helpers for tests of codecs. Each raises AssertionError for what it checks; tests/test_common.py sees it do so."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def photograph(*shape, seed=0):
    """A smooth uint8 array with a little noise, no two of its axes alike."""
    rng = np.random.default_rng(seed)
    waves = [np.sin(np.arange(size) * (0.05 + 0.1 * k) + seed + 2 * k) for k, size in enumerate(shape)]
    total = sum(np.expand_dims(wave, [j for j in range(len(shape)) if j != k]) for k, wave in enumerate(waves))
    values = 128 + 100 * total / max(1, len(shape)) + rng.normal(0, 3, shape)
    return np.clip(values, 0, 255).astype("u1")


def psnr(one, other):
    """Peak signal-to-noise ratio of two uint8 arrays in dB."""
    error = np.square(np.asarray(one, "f8") - np.asarray(other, "f8")).mean()
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


def guarded(size, guard=1 << 16):
    """Return a uint8 buffer of `size` bytes, and the bytes after it, which a kernel must leave as they are: 165."""
    whole = np.full(size + guard, 165, np.uint8)
    return whole[:size], whole[size:]


def raw(section):
    """A kind of section whose content is its bytes as they are."""
    return dataclasses.replace(section, encode=bytes, decode=lambda data, header: data)


def check_roundtrip(codec, array, decibels=np.inf):
    """Encode and decode: shape, dtype, memory order come back, and pixels as well as asked for. Returns the payload."""
    before = array.copy(order="K")
    payload = codec.encode(array)
    assert type(payload) is bytes
    np.testing.assert_array_equal(array, before, "the codec wrote to its input")
    decoded = codec.decode(payload)
    assert decoded.dtype == array.dtype and decoded.shape == array.shape
    assert decoded.flags.c_contiguous or not array.flags.c_contiguous
    assert decoded.flags.f_contiguous or not array.flags.f_contiguous
    assert decibels == -np.inf or psnr(decoded, array) >= decibels, f"{psnr(decoded, array):.2f} dB"
    for out in (np.empty_like(array), *(np.empty(array.shape, array.dtype, order=order) for order in "CF")):
        out[...] = 99
        assert codec.decode(payload, out=out) is out
        np.testing.assert_array_equal(out, decoded, "out= was filled otherwise")
    flat = bytearray(array.nbytes)
    codec.decode(memoryview(payload), out=flat)
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    assert bytes(flat) == decoded.tobytes(order=order), "a flat out= is filled in memory order"
    return payload


def check_config(codec):
    """Configuration survives JSON, copies are equal, and what is pickled is only configuration."""
    config = json.loads(json.dumps(codec.get_config()))
    assert config.pop("id") == codec.codec_id
    same = type(codec).from_config(config)
    assert same == codec and hash(same) == hash(codec)
    assert same.get_config() == codec.get_config()
    pickled = pickle.dumps(codec)
    assert pickle.loads(pickled) == codec
    assert len(pickled) < 600


def check_repr(codec):
    """The repr is the call that makes an equal codec."""
    text = repr(codec)
    assert eval(text, {type(codec).__name__: type(codec)}) == codec, text


def check_rejects(error, words, call, *args, **kwargs):
    """The call raises this kind of error, with a message that has these words; returns the message."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    for word in words.split("|"):
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


def run_python(code, *paths, **environment):
    """Run code in a fresh process that finds the checkout and these folders; returns what it prints."""
    path = os.pathsep.join([str(ROOT), *(str(p) for p in paths)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_lazy(code, *paths, unwanted=("torch", "dask", "xarray")):
    """Code leaves these modules unimported; returns what it prints."""
    report = (
        f"\nimport sys\nfound = [name for name in {tuple(unwanted)} if name in sys.modules]\nassert not found, found\n"
    )
    return run_python(textwrap.dedent(code) + report, *paths)
