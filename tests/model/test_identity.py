"""Models whose identities begin with the same digits, which is all that a payload has of them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from benchmarks import fuzz
from deepsic_codec import (
    DeepSIC,
    chunk_attrs,
    config,
    create_array,
    decode_features,
    open_archive,
    open_labels,
    relabel,
)
from deepsic_codec import dask as bulk
from deepsic_codec.errors import ModelMismatch
from deepsic_codec.model import file, scheduler
from deepsic_codec.model.zoo import PACKAGED, find_model
from tests.common import check_rejects, photograph

IMAGE = photograph(64, 96, 3)
NAMES = "one", "two"


@pytest.fixture
def twins(tmp_path, monkeypatch):
    """Two models of other tensors and classes, whose identities begin with the same digits."""
    base, identities = find_model("base"), file.identities

    def alike(*args):
        decoder, head = identities(*args)
        packaged = decoder == base.decoder
        return (decoder, head) if packaged else (prefix[0] + decoder[16:], prefix[1] + head[8:])

    prefix = ["5" * 16, "6" * 8]
    monkeypatch.setattr(file, "identities", alike)
    monkeypatch.setattr(scheduler, "_schedulers", {})
    models = {}
    for seed, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        info = fuzz.tiny_model(tmp_path / name, seed, name)
        words = replace(info.vocabulary, classes=tuple(f"{name} {k}" for k in range(len(info.vocabulary.classes))))
        models[name] = file.save_model(info.path, name, file.load_arrays(info), info.architecture, words, {})
    one, two = models.values()
    assert one.decoder[:16] == two.decoder[:16] and one.decoder != two.decoder
    assert one.head[:8] == two.head[:8] and one.head != two.head
    config.set(cache=tmp_path / "cache")
    return models


def install(models, *names):
    config.set(model_path=[Path(models[name].path).parent for name in names])


def read_all(url, name):
    """Everything that is decoded of an array, in all ways."""
    array = open_archive(url, name, mode="r+")
    labels = relabel(array)
    chosen = labels.where(f'"{name} 0" >= 0')
    return {
        "zarr": array[...],
        "dask": np.asarray(bulk.open(url, name)),
        "query": np.concatenate([match.array.ravel() for match in chosen.iter_arrays()]),
        "features": decode_features(array).compute(scheduler="sync"),
        "labels": [str(chunk_attrs(array, (0, k, 0))["labels"]) for k in range(3)],
        "computed": labels.map(f"{name} 0"),
        "scanned": open_labels(array, scan=True).summary()["classes"],
    }


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_metadata_decides_which_model_decodes(twins, tmp_path, monkeypatch, zarr_format):
    url, expected = str(tmp_path / "a.zarr"), {}
    for name in NAMES:
        install(twins, name)
        semantics = "post" if name == "two" else "pre"
        codec = DeepSIC(model=name, quality=40, transform="features", semantics=semantics)
        create_array(url, name=name, data=IMAGE, chunks=(64, 32, 3), codec=codec, zarr_format=zarr_format)
        expected[name] = read_all(url, name)
    assert not np.array_equal(expected["one"]["zarr"], expected["two"]["zarr"])
    for order in (NAMES, NAMES[::-1]):
        monkeypatch.setattr(scheduler, "_schedulers", {})
        install(twins, *order)
        for name in NAMES:
            np.testing.assert_equal(read_all(url, name), expected[name])
    assert all(f"{name} 0" in expected[name]["scanned"] for name in NAMES)


def test_a_payload_alone_does_not_tell(twins):
    install(twins, "one")
    payload = DeepSIC(model="one", quality=40, transform="features").encode(IMAGE)
    expected = DeepSIC().decode(payload)
    install(twins, *NAMES)
    for call in (DeepSIC().decode, DeepSIC().decode_features):
        message = check_rejects(ModelMismatch, "two models fit", call, payload)
        assert all(one.decoder in message and one.path in message for one in twins.values())
    check_rejects(ModelMismatch, "two models fit", find_model, "5" * 16)
    one = twins["one"]
    assert find_model(one.decoder) == find_model(one.decoder, head=one.head) == one
    codec = DeepSIC(model="one", quality=40, decoder=one.decoder, head=one.head)
    np.testing.assert_array_equal(codec.decode(payload), expected)


def test_two_heads_of_one_decoder_do_not_matter_for_pixels(twins, tmp_path):
    one = twins["one"]
    words = replace(one.vocabulary, classes=tuple("abc"))
    (tmp_path / "more").mkdir()
    other = file.save_model(
        tmp_path / "more" / "m.safetensors", "m", file.load_arrays(one), one.architecture, words, {}
    )
    assert other.decoder == one.decoder and other.head != one.head
    config.set(model_path=[Path(one.path).parent, tmp_path / "more"])
    assert find_model("5" * 16) == one and find_model("5" * 16, preferred="m") == other
    check_rejects(ModelMismatch, "two models fit", find_model, one.decoder, head="6" * 8)
    assert find_model(one.decoder, head=other.head) == other


@pytest.mark.parametrize("place", ["cache", "model_path"])
def test_the_packaged_model_is_never_displaced(twins, tmp_path, monkeypatch, place):
    base = find_model("base")
    payload = DeepSIC(quality=40).encode(IMAGE)
    expected = DeepSIC().decode(payload)
    path = tmp_path / place / "stranger.safetensors"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(twins["one"].path, path)
    content = path.read_bytes()
    for old, new in ((twins["one"].decoder, base.decoder[:16]), (twins["one"].head, base.head[:8])):
        content = content.replace(old.encode(), (new + old[len(new) :]).encode())
    path.write_bytes(content)
    config.set(**{place: path.parent})
    assert find_model(base.decoder[:16], head=base.head[:8]) == base and base.path.startswith(str(PACKAGED))
    assert find_model(base.decoder[:16] + twins["one"].decoder[16:]).path == str(path)
    monkeypatch.setattr(scheduler, "_schedulers", {})
    np.testing.assert_array_equal(DeepSIC().decode(payload), expected)


def test_archives_name_their_model_by_whole_hashes(twins, tmp_path):
    install(twins, "one")
    array = create_array(tmp_path / "a.zarr", name="a", data=IMAGE, codec=DeepSIC(model="one"))
    about = zarr.open_array(tmp_path / "a.zarr", path="a").metadata.to_dict()
    assert array.shape == IMAGE.shape and twins["one"].decoder in str(about) and twins["one"].head in str(about)
