"""Model files of strangers: every tensor is compared with the table of its family before anything is computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import fuzz
from deepsic_codec import config
from deepsic_codec.errors import DeepSICError, ModelMismatch
from deepsic_codec.model.families import FAMILIES, architecture_from, family_of, load_checked
from deepsic_codec.model.file import load_arrays, read_info, save_model
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.tensors import check_tensors, cost
from deepsic_codec.model.zoo import find_model
from tests.common import check_rejects


@pytest.fixture(scope="module", params=FAMILIES)
def sound(request, tmp_path_factory):
    """A small model of each family: description, arrays and table."""
    make = {"deepsic": fuzz.tiny_model, "paper": fuzz.tiny_paper_model}[request.param]
    info = make(tmp_path_factory.mktemp("sound"))
    arch = architecture_from(info.architecture)
    return info, load_arrays(info), family_of(arch).tensors(arch)


def test_networks_write_what_the_table_says(sound):
    info, arrays, table = sound
    check_tensors(arrays, table, "it")
    assert arrays.keys() == table.keys() and load_checked(info)[0].to_json() == info.architecture


def test_the_packaged_model_is_within_its_table_and_the_limits():
    info = find_model("base")
    arch, _ = load_checked(info)
    macs, memory = cost(family_of(arch).tensors(arch))
    assert 20_000 < macs < config.get().max_model_macs / 4 and 40 < memory < config.get().max_model_memory * 0.6


def test_any_other_tensor_is_refused_by_name(sound):
    _, arrays, table = sound
    for name, array in arrays.items():
        changes = [array[None], array.reshape(-1)[:-1], array.astype("f8")]
        low, high = table[name].low, table[name].high
        values = [np.nan, np.inf, -np.inf]
        if array.dtype.kind in "iu":
            limits = np.iinfo(array.dtype)
            values = [value for value in (low - 1, high + 1) if limits.min <= value <= limits.max]
        for value in values:
            beyond = array.copy()
            beyond.reshape(-1)[-1] = value
            changes.append(beyond)
        for change in changes:
            check_rejects(ModelMismatch, name, check_tensors, arrays | {name: change}, table, "it")
        rest = {other: tensor for other, tensor in arrays.items() if other != name}
        check_rejects(ModelMismatch, f"{name} is missing", check_tensors, rest, table, "it")
    check_rejects(
        ModelMismatch, "decoder.more is unknown", check_tensors, arrays | {"decoder.more": array}, table, "it"
    )


def test_what_a_model_costs_is_limited_by_settings(sound):
    info, _, table = sound
    macs, memory = cost(table)
    for name, value in (("max_model_macs", macs), ("max_model_memory", memory)):
        with config.set(**{name: int(value) - 1}):
            check_rejects(ModelMismatch, name, load_checked, info)
        with config.set(**{name: int(value) + 1}):
            load_checked(info)


@pytest.mark.parametrize(
    "layer", ["decoder.synthesis.blocks8.0.spatial", "encoder.analysis.blocks16.0.spatial", "head.blocks.0.spatial"]
)
def test_sums_that_could_be_inexact_are_refused(tmp_path, layer):
    """Each weight and bias is within its range, but their sums are too large."""
    info = fuzz.tiny_model(tmp_path)
    arch = architecture_from(info.architecture)
    arrays, table = load_arrays(info), family_of(arch).tensors(arch)
    for name in (f"{layer}.weight", f"{layer}.bias"):
        arrays[name] = np.full_like(arrays[name], table[name].high)
    check_tensors(arrays, table, "it")
    other = save_model(tmp_path / "other.safetensors", "other", arrays, info.architecture, info.vocabulary, {})
    check_rejects(ModelMismatch, f"{layer}|sums are exact", load_checked, other)


@pytest.mark.parametrize(
    "sizes",
    [
        {"latents": 2048},
        {"latents": 0},
        {"classes": 256},
        {"classes": "x"},
        {"synthesis_blocks": [64, 64], "synthesis_widths": [2000, 2000]},
        {"synthesis_blocks": [1 << 16, 1]},
        {"synthesis_blocks": [1, 1, 1]},
        {"synthesis_blocks": 3},
        {"head_blocks": [1]},
        {"head_width": 3.5},
        {"prior_groups": [1] * 16},
        {"prior_groups": 5},
        {"strides": [16, 1, 1, 1]},
        {"strides": [-4, -2, 2, 1]},
        {"strides": 5},
        {"rate": "x"},
        {"family": "none"},
        {"family": []},
        {"more": 1},
    ],
    ids=str,
)
def test_descriptions_of_other_networks_are_refused(sound, sizes):
    info = sound[0]
    check_rejects(ModelMismatch, info.path, load_checked, replace(info, architecture=info.architecture | sizes))


def test_a_vocabulary_of_other_classes_is_refused(sound, tmp_path):
    info, arrays, _ = sound
    words = replace(info.vocabulary, classes=("a", "b"))
    other = save_model(tmp_path / "other.safetensors", "other", arrays, info.architecture, words, {})
    check_rejects(ModelMismatch, "2 classes for", load_checked, other)
    none = save_model(tmp_path / "none.safetensors", "none", arrays, info.architecture, replace(words, classes=()), {})
    load_checked(none)  # a model without labels


def test_forged_models_are_refused_or_used(sound, tmp_path):
    """Identities are right again, whatever the tensors are; those that fit encode, decode and label."""
    rng, path, outcomes = np.random.default_rng(2), tmp_path / "forged.safetensors", set()
    arrays = load_arrays(sound[0])
    for _ in range(25):
        try:
            fuzz.forged(rng, sound[0], arrays, path)
            outcomes.add(fuzz.use_model(read_info(path), rng.bytes(30)))
        except DeepSICError as error:
            outcomes.add(type(error))
    assert outcomes == {"used", ModelMismatch}


def test_sums_of_floating_point_networks_that_overflow_are_pixels_all_the_same(tmp_path):
    info = fuzz.tiny_paper_model(tmp_path)
    arrays = load_arrays(info)
    signs = np.random.default_rng(0).integers(0, 2, 10_000) * 2 - 1
    largest = {n: np.resize(65504 * signs, v.shape).astype("f2") for n, v in arrays.items() if v.dtype == np.float16}
    largest = {n: np.zeros_like(v) if n.endswith(("running_var", "tracked")) else v for n, v in largest.items()}
    info = save_model(tmp_path / "large.safetensors", "large", arrays | largest, info.architecture, info.vocabulary, {})
    model, quality = LoadedModel(info), np.array([50.0])
    assert model.analyse(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), quality).scaled.isfinite().all()
    assert fuzz.use_model(info, b"") == "used"
