"""What the contexts of wavelets start with is found from images."""

import numpy as np
import tifffile
from PIL import Image

from deepsic_codec.payload.coders import band_contexts
from deepsic_codec.payload.coders.subbands import encode_planes
from deepsic_codec.training import wavelet_contexts
from deepsic_codec.training.wavelet_contexts import coded_crops, fit_contexts, fit_mixers, main
from tests.common import photograph


def test_a_start_from_images_saves_bytes_of_others(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(wavelet_contexts, "CROPS", 4)
    examples = list(coded_crops([photograph(140, 150, 3, seed=seed) for seed in range(4)], (0.2, 2.0), rng))
    logits, counts = fit_contexts(examples)
    none = np.zeros((band_contexts.MIXERS, band_contexts.INPUTS), np.int16)
    contexts, _ = band_contexts.unpacked(band_contexts.packed(logits, counts, none))
    weights = fit_mixers(examples, contexts).astype(np.int32) * band_contexts.WEIGHT_UNIT
    starts = [
        (contexts, weights),
        (contexts, wavelet_contexts.first_mixers()),
        (np.full_like(contexts, wavelet_contexts.EVEN), wavelet_contexts.first_mixers()),
    ]
    ((planes, code), *_) = coded_crops([photograph(140, 150, 3, seed=9)], (0.5, 0.5), rng)
    sizes = []
    for start in starts:
        monkeypatch.setattr("deepsic_codec.payload.coders.subbands.initial", lambda start=start: start)
        sizes.append(len(encode_planes(planes.copy(), code)[0]))
    assert sizes[0] < sizes[1] < 0.985 * sizes[2]


def test_command_writes_the_file(tmp_path, monkeypatch):
    (tmp_path / "photographs").mkdir()
    Image.fromarray(photograph(70, 70, 3)).save(tmp_path / "photographs" / "one.png")
    tifffile.imwrite(tmp_path / "scene.tif", photograph(70, 80).astype("f4"))
    monkeypatch.setattr(wavelet_contexts, "CROPS", 1)
    out = tmp_path / "contexts.txt"
    main(["--images", f"{tmp_path / 'photographs'}", "--scenes", f"{tmp_path / 'scene.tif'}", "--out", f"{out}"])
    contexts, mixers = band_contexts.unpacked(out.read_text())
    assert contexts.shape == (band_contexts.AT.size,) and mixers.shape == (band_contexts.MIXERS, band_contexts.INPUTS)
    assert (contexts != wavelet_contexts.EVEN).any()
