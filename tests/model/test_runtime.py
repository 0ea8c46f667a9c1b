"""A loaded model: files that are altered or do not fit are refused, and each function works on one batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from deepsic_codec.errors import ModelMismatch
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.batch import grid_of
from deepsic_codec.model.file import load_arrays, save_model
from deepsic_codec.model.runtime import Chosen, LoadedModel
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import drone_frame
from tests.common import check_rejects


@pytest.fixture(scope="module")
def model():
    return LoadedModel(find_model("base"))


def test_functions_in_turn(model):
    """Analyse, choose, code, decode, score and synthesise a batch of two chunks of two slices."""
    frame = drone_frame()
    images = np.stack([frame[y : y + 80, x : x + 96] for y in (0, 300) for x in (0, 500)])
    quality = np.repeat([50.0, 75.0], 2)
    with torch.inference_mode():
        analysed = model.analyse(torch.from_numpy(images), quality)
        nearest, chosen = (model.choose(analysed.scaled, quality, effort) for effort in (0, 1))
        assert nearest.predictions is None and chosen.predictions is not None
        assert (nearest.symbols == torch.round(analysed.scaled)).all()
        assert 0 < (nearest.symbols != chosen.symbols).sum() < nearest.symbols.numel() / 4
        known = model.encode_symbols(chosen, 2, [50.0, 75.0])()
        assert known == model.encode_symbols(Chosen(chosen.symbols, None), 2, [50.0, 75.0])()
        decoded = model.decode_symbols(known, (2, 80, 96), [50.0, 75.0], None, False)
        np.testing.assert_array_equal(np.concatenate(decoded), chosen.symbols.numpy())
        scores = model.score(analysed.latents, quality)
        assert scores.shape == (4, 2, 2, model.arch.outputs) and scores.dtype == torch.uint8
        single = model.score(analysed.latents[2:3], quality[2:3])
        assert (single[0].int() - scores[2].int()).abs().max() <= 1
        pixels = model.synthesise(chosen.symbols, quality, q6=False, trellis=False)
        assert pixels.shape == (4, 80, 96, 3)
        assert np.square(pixels.numpy() - images.astype(float)).mean() < 100


@pytest.mark.parametrize("size, grid", [((1, 1), (1, 1)), ((16, 17), (1, 2)), ((160, 161), (10, 11))])
def test_grid(size, grid):
    assert grid_of((3, *size)) == grid


def test_a_cpu_has_no_device_coder(model):
    assert model.device_coder() is None


def test_altered_model_is_refused(tmp_path):
    info = find_model("base")
    arrays = dict(load_arrays(info))
    name = "decoder.prior.0.out_bias"
    arrays[name] = arrays[name] + 1
    other = save_model(tmp_path / "base.safetensors", "base", arrays, info.architecture, info.vocabulary, {})
    assert other.decoder != info.decoder
    check_rejects(ModelMismatch, "SHA-256", LoadedModel, replace(info, path=other.path))
    del arrays[name]
    incomplete = save_model(tmp_path / "c.safetensors", "c", arrays, info.architecture, info.vocabulary, {})
    check_rejects(ModelMismatch, "do not fit", LoadedModel, incomplete)
    arrays = dict(load_arrays(info)) | {"decoder.coder.levels": np.full(256, 200, np.uint8)}
    beyond = save_model(tmp_path / "e.safetensors", "e", arrays, info.architecture, info.vocabulary, {})
    check_rejects(ModelMismatch, "do not fit", LoadedModel, beyond)
    wide = save_model(
        tmp_path / "d.safetensors",
        "d",
        arrays,
        Architecture.from_json(info.architecture).to_json() | {"synthesis_widths": [64, 64]},
        info.vocabulary,
        {},
    )
    check_rejects(ModelMismatch, "do not fit", LoadedModel, wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_of_torch_changes_nothing(model, dtype):
    image, quality = torch.from_numpy(drone_frame()[None, :64, :64]), np.array([30.0])
    torch.set_default_dtype(dtype)
    try:
        other = LoadedModel(model.info)
        with torch.inference_mode():
            latents = other.analyse(image, quality).scaled
            refined = other.choose(latents, quality, 2, images=image).symbols
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert torch.equal(refined, model.choose(latents, quality, 2, images=image).symbols)
