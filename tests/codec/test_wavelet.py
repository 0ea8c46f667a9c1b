"""Chunks at the ends of dtypes and of targets, as wavelets."""

import numpy as np
import pytest

from deepsic_codec import DeepSIC
from tests.common import photograph

pytestmark = pytest.mark.filterwarnings("error")

#: One of each, and all beyond what chunks reach; a target has to be met, or nearly so.
TARGETS = [
    {"quality": 1},
    {"quality": 200},
    {"psnr": 1e-9},
    {"psnr": 1e5},
    {"rmse": 1e-300},
    {"rmse": 1e300},
    {"bpp": 1e-9},
    {"bpp": 1e9},
]


@pytest.mark.parametrize("target", [*TARGETS, {"quality": 200, "value_range": (0, 1)}], ids=str)
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "f4"])
def test_extremes_of_a_dtype(dtype, target):
    """Low bands of six levels have the largest symbols: 68 times those of a plane that is not split."""
    info = np.finfo(dtype) if dtype == "f4" else np.iinfo(dtype)
    low, high = float(info.min), float(info.max)
    blocks = np.add.outer(np.arange(390) // 130, np.arange(390) // 130) % 2
    if dtype == "f4":
        target = target | {"value_range": "chunk"}
    for array in (np.full((390, 390), low), np.full((390, 390), high), np.where(blocks, low, high)):
        array = array.astype(dtype)
        codec = DeepSIC(axes="yx", semantics="none", transform="wavelet", **target)
        decoded = codec.decode(codec.encode(array)).astype("f8")
        assert np.isfinite(decoded).all()
        if 200 in target.values() or 1e5 in target.values():
            assert np.abs(decoded - array).max() <= (high - low) / 10000 + 1


@pytest.mark.parametrize("target", [{"rmse": 1e-9}, {"psnr": 300}, {"bpp": 1000}], ids=str)
def test_targets_out_of_reach_take_one_trial(target, monkeypatch):
    from deepsic_codec.codec import wavelet

    trials = []
    encode = wavelet.WaveletEncoder.encode
    monkeypatch.setattr(wavelet.WaveletEncoder, "encode", lambda self, code: trials.append(code) or encode(self, code))
    DeepSIC(axes="yx", semantics="none", transform="wavelet", **target).encode(photograph(40, 50))
    assert len(trials) == 1
