"""Training of the filter of wavelets."""

import base64

import numpy as np
import tifffile
import torch
from PIL import Image

from deepsic_codec.codec import wavelet_filter
from deepsic_codec.payload.steps import PER_OCTAVE
from deepsic_codec.training.wavelet_filter import Pair, crops, fit, integers, main, pairs
from tests.common import photograph


def noisy(count=3):
    """Squares of one value, and the same with noise."""
    rng = np.random.default_rng(0)
    exact = np.kron(rng.normal(0, 20, (count, 9, 9)), np.ones((16, 16))).astype(np.float32)
    return [Pair(exact, exact + rng.normal(0, 0.7, exact.shape).astype(np.float32))]


def test_integers_correct_as_was_trained(tmp_path, monkeypatch):
    (pair,) = part = noisy()
    net = fit([part], 60)
    path = tmp_path / "weights.txt"
    path.write_bytes(base64.b85encode(integers(net)))
    monkeypatch.setattr(wavelet_filter, "WEIGHTS", path)
    wavelet_filter.tables.cache_clear()
    try:
        code, unit = 12 * PER_OCTAVE, 256  # a step of 16, and so many sixteenths
        plane = np.rint(pair.decoded[0] * unit).astype(np.int32)
        with torch.no_grad():
            wanted = net(torch.from_numpy((plane / unit).astype("f4"))[None, None])[0, 0].numpy()
        found = wavelet_filter.filter_plane(plane.copy(), code) / unit
    finally:
        wavelet_filter.tables.cache_clear()
    before, after = (np.square(one - pair.exact[0]).mean() for one in (plane / unit, found))
    assert after < 0.95 * before
    assert np.square(found - wanted).mean() < 0.2 * np.square(wanted - plane / unit).mean()


def test_crops_are_coded_at_their_rates():
    (crop, *_) = crops(photograph(140, 150, 3), np.random.default_rng(0))
    assert crop.shape == (140, 150, 3)
    few, many = pairs(crop, (0.3, 2.0))
    assert few.exact.shape == few.decoded.shape == (3, 140, 150)
    steps = [np.ptp(pair.exact[0]) for pair in (few, many)]
    assert steps[1] > 3 * steps[0]  # of more and smaller steps
    for pair in (few, many):
        assert 0.01 < np.square(pair.exact - pair.decoded).mean() < 0.15


def test_command_writes_weights(tmp_path, monkeypatch):
    (tmp_path / "photographs").mkdir()
    Image.fromarray(photograph(140, 150, 3)).save(tmp_path / "photographs" / "one.png")
    tifffile.imwrite(tmp_path / "scene.tif", photograph(128, 130).astype("f4"))
    monkeypatch.setattr("deepsic_codec.training.wavelet_filter.RATES", {"images": (0.5,), "scenes": (0.5,)})
    out = tmp_path / "weights.txt"
    sources = ["--images", f"{tmp_path / 'photographs'}", "--scenes", f"{tmp_path / 'scene.tif'}"]
    main([*sources, "--steps", "2", "--out", f"{out}"])
    assert len(base64.b85decode(out.read_text().replace("\n", ""))) == 4852
