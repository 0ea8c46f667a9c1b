"""Heads in files of their own: by name, for a decoder, embedded in archives, and refused where they do not fit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, chunk_attrs, config, consolidate_labels, create_array, open_archive, relabel
from deepsic_codec.errors import ConfigurationError, ModelMismatch, ModelNotFound
from deepsic_codec.labels.embeddings import read_embeddings
from deepsic_codec.model import scheduler, zoo
from deepsic_codec.model.families import load_checked
from deepsic_codec.model.file import HeadInfo, load_arrays, read_file, read_info, save_head
from deepsic_codec.model.vocabulary import Vocabulary
from tests.common import check_rejects, photograph

pytest.importorskip("torch")
IMAGE = photograph(70, 140, 3)
NAMES = Vocabulary(("Sand", "Rock"), {"Ground": ("Sand", "Rock")})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from benchmarks.fuzz import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models"))


def head_of(model, path, vocabulary=NAMES, change=None, **sizes):
    """A head of two classes and 6 values, made from that of a model; `change` alters its tensors."""
    arrays = {k: v for k, v in load_arrays(model).items() if k.startswith("head.")}
    rows = np.arange(3 + 6) % len(arrays["head.out.weight"])
    arrays |= {f"head.out.{part}": arrays[f"head.out.{part}"][rows] for part in ("weight", "bias", "shift")}
    arrays["head.out.bias"] = arrays["head.out.bias"] + np.arange(9, dtype=np.int32)
    if change is not None:
        change(arrays)
    sizes = {**model.architecture, "classes": 3, "head_embedding": 6, **sizes}
    return save_head(path, Path(path).stem, arrays, model, sizes, vocabulary, {})


@pytest.fixture
def head(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "_schedulers", {})
    config.set(model_path=(tiny.path, str(tmp_path / "soil.safetensors")), cache=str(tmp_path / "cache"))
    return head_of(tiny, tmp_path / "soil.safetensors")


def test_files(tiny, head):
    assert read_file(head.path) == head and isinstance(head, HeadInfo)
    assert head.decoder == tiny.decoder and head.head != tiny.head
    assert Path(head.path).stat().st_size < 2**16
    check_rejects(ModelMismatch, "a head file|head=", read_info, head.path)
    info = zoo.find_model(tiny.decoder, head=head.head)
    assert info == tiny.with_head(head) and info.vocabulary.classes == ("Sand", "Rock") and info.values == 6
    arch, arrays = load_checked(info)
    assert (arch.classes, arch.head_embedding) == (3, 6) and len(arrays["head.out.weight"]) == 9
    assert zoo.find_model(tiny.name).head == tiny.head, "the head of the model comes first"
    assert zoo.find_head("soil", tiny.decoder) == head.head == zoo.find_head(head.head[:8], tiny.decoder)
    assert zoo.find_head(tiny.name, tiny.decoder) == tiny.head


def test_names(tiny, head):
    codec = DeepSIC(model=tiny.name, head="soil")
    assert codec.identity() == (tiny.decoder, head.head)
    assert codec.get_config()["head"] == head.head
    assert DeepSIC(model=tiny.name, head=head.head).identity() == codec.identity()
    check_rejects(ModelNotFound, "no head 'clay'|searched", DeepSIC(model=tiny.name, head="clay").identity)
    check_rejects(ModelMismatch, f"{tiny.decoder[:16]}|soil|use a head", DeepSIC(head="soil").resolved)
    check_rejects(ConfigurationError, "head", DeepSIC, head="")
    check_rejects(ConfigurationError, "head: expected a SHA-256", DeepSIC, head="soil", decoder=tiny.decoder)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_archives_embed_heads(tiny, head, tmp_path, monkeypatch, zarr_format):
    store = {}
    codec = DeepSIC(model=tiny.name, head="soil", embedding=True, label_tile=64)
    array = create_array(
        store,
        name="group/image",
        data=IMAGE,
        chunks=(70, 140, 3),
        codec=codec,
        embed_model=True,
        zarr_format=zarr_format,
    )
    names = {name for name in zarr.open_group(store, path="group") if name.startswith("deepsic")}
    ids = f"{tiny.decoder[:16]}-"
    assert names == {f"deepsic-model-{ids}{tiny.head[:8]}", f"deepsic-head-{ids}{head.head[:8]}"}
    labels, vectors = chunk_attrs(array, (0, 0, 0))["labels"], read_embeddings(consolidate_labels(array))
    assert vectors.shape == (2, 3, 1, 6) and vectors.any()
    config.set(model_path=())
    monkeypatch.setattr(scheduler, "_schedulers", {})
    opened = open_archive(store)
    assert opened.shape == IMAGE.shape and np.asarray(opened[:1]).size
    assert chunk_attrs(opened, (0, 0, 0))["labels"] == labels
    assert read_embeddings(relabel(array)).shape == vectors.shape
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        f"{tiny.decoder[:32]}-{one.head[:16]}.safetensors" for one in (tiny, head)
    }


def test_relabelling(tiny, head):
    store = {}
    array = create_array(store, name="image", data=IMAGE, chunks=(70, 140, 3), codec=DeepSIC(model=tiny.name))
    before = dict(store)
    by_name, by_file = relabel(array, "soil"), relabel(array, head.path)
    assert by_name.vocabulary == by_file.vocabulary == head.vocabulary
    assert by_name.index.values == 6
    assert all(store[key].to_bytes() == value.to_bytes() for key, value in before.items() if "/c/" in key)
    other = create_array({}, name="image", shape=(64, 64, 3), dtype="u1", chunks=(64, 64, 3), codec=DeepSIC())
    for one in ("soil", head.path):
        check_rejects(ModelMismatch, f"soil|{tiny.decoder[:16]}|decoder", relabel, other, one)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda a: a.update({"head.out.weight": a["head.out.weight"][:5]}), "head.out.weight is int8"),
        (lambda a: a.update({"head.out.shift": a["head.out.shift"] + np.uint8(200)}), "head.out.shift has values"),
        (lambda a: a.pop("head.stem.bias"), "head.stem.bias is missing"),
        (lambda a: a.update({"head.more": np.zeros(3, np.int8)}), "head.more is unknown"),
        (lambda a: a.update({"head.score": a["head.score"].astype(np.float32)}), "head.score is float32"),
        (lambda a: a.update({"decoder.coder.rate": np.zeros((), np.int64)}), "decoder.coder.rate|head."),
    ],
)
def test_tensors_that_do_not_fit(tiny, tmp_path, change, words):
    bad = head_of(tiny, tmp_path / "bad.safetensors", change=change)
    check_rejects(ModelMismatch, words, load_checked, tiny.with_head(bad))


def test_other_damage(tiny, head, tmp_path):
    more = head_of(tiny, tmp_path / "more.safetensors", replace(NAMES, classes=("Sand", "Rock", "Clay")))
    check_rejects(ModelMismatch, "vocabulary of 3 classes for 3 scores", load_checked, tiny.with_head(more))
    huge = head_of(tiny, tmp_path / "huge.safetensors", head_width=2000)
    check_rejects(ModelMismatch, "huge.safetensors|expected int32 (2000,)", load_checked, tiny.with_head(huge))
    check_rejects(ModelMismatch, "decoder|use a head", zoo.find_model("base").with_head, head)
    data = Path(head.path).read_bytes()
    Path(head.path).write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    check_rejects(ModelMismatch, "soil|damaged or altered", load_checked, tiny.with_head(head))


def forged(path, out, **changes):
    """A head file with other entries in its description."""
    data = Path(path).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    about = json.loads(header["__metadata__"]["deepsic_head"]) | changes
    header["__metadata__"]["deepsic_head"] = json.dumps(about)
    text = json.dumps(header).encode()
    out.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return out


@pytest.mark.parametrize(
    "changes,words",
    [
        (
            {"vocabulary": {"classes": ["a", "b"], "parents": {"c": ["d"], "d": ["e", "a"], "e": ["c"]}}},
            "a cycle of parents",
        ),
        ({"vocabulary": {"classes": ["a", "b"], "parents": {"c": ["a", "c"]}}}, "a cycle of parents"),
        ({"vocabulary": {"classes": ["a", "a"]}}, "different names"),
        ({"vocabulary": None}, "not a vocabulary"),
        ({"decoder": "abc"}, "SHA-256"),
        ({"head": 7}, "damaged"),
        ({"architecture": {"latents": 3}}, "sizes of other networks"),
        ({"architecture": {"head_width": [[1]]}}, "unsupported value"),
        ({"family": ["deepsic"]}, "name and family"),
        ({"name": "x" * 300}, "name and family"),
    ],
)
def test_descriptions_that_are_wrong(head, tmp_path, changes, words):
    check_rejects(ModelMismatch, words, read_file, forged(head.path, tmp_path / "forged.safetensors", **changes))


def test_a_large_hierarchy_is_checked_in_no_time():
    layers = {f"p{k}_{i}": [f"p{k + 1}_{j}" for j in range(8)] for k in range(29) for i in range(8)}
    assert Vocabulary.from_json({"classes": ["a"], "parents": layers | {"top": ["p0_0"]}}).parents["top"] == ("p0_0",)
