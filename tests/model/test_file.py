"""Model files: identities, finding, damage."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepsic_codec import config
from deepsic_codec.errors import ModelMismatch, ModelNotFound
from deepsic_codec.model.file import identities, load_arrays, read_info, save_model
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.model.zoo import ALIASES, HEAD_ALIASES, PACKAGED, find_model, resolve
from tests.common import check_lazy, check_rejects

ARCHITECTURE = {"name": "toy", "latents": 4, "analysis_widths": [2, 2], "head_width": 3, "classes": 3}
VOCABULARY = Vocabulary(("Sand", "Rock"), {"Ground": ("Sand", "Rock")})


def arrays():
    return {
        "decoder.a": np.arange(6, dtype=np.int8).reshape(2, 3),
        "decoder.number": np.asarray(7, np.int64),
        "encoder.b": np.ones(3, np.float16),
        "head.c": np.zeros((2, 2), np.float32),
    }


@pytest.fixture
def toy(tmp_path, monkeypatch):
    config.set(model_path=tmp_path)
    return save_model(tmp_path / "toy.safetensors", "toy", arrays(), ARCHITECTURE, VOCABULARY, {"by": "a test"})


def test_found_by_name_and_by_identity(toy):
    assert find_model("toy") == find_model(toy.decoder) == find_model(toy.decoder[:16], head=toy.head[:8]) == toy
    assert find_model("toy", head="00000000") == toy, "a head of zeros asks for none"
    assert toy.vocabulary.names == ("Sand", "Rock", "unknown")
    for name, array in load_arrays(toy).items():
        np.testing.assert_array_equal(array, arrays()[name])


def other_encoder(folder, file="a", name="other"):
    """A model with the toy's decoder and head."""
    folder.mkdir(exist_ok=True)
    changed = arrays()
    changed["encoder.b"] *= 2
    return save_model(folder / f"{file}.safetensors", name, changed, ARCHITECTURE, VOCABULARY, {})


def test_the_first_of_several_files_with_one_decoder(toy, tmp_path, monkeypatch):
    other = other_encoder(tmp_path)  # a.safetensors, before toy.safetensors
    assert (other.decoder, other.head) == (toy.decoder, toy.head) and other.encoder != toy.encoder
    assert find_model(toy.decoder) == find_model(toy.decoder[:16], head=toy.head) == other
    assert find_model("toy") == find_model(toy.decoder, head=toy.head, preferred="toy") == toy
    assert find_model(toy.decoder, preferred="nobody") == other, "to decode, any will do"
    later = other_encoder(tmp_path / "later", name="later")
    for order in ([tmp_path, tmp_path / "later"], [tmp_path / "later", tmp_path]):
        config.set(model_path=order)
        assert find_model(toy.decoder) == (other if order[0] == tmp_path else later), "folders come in their order"
        assert find_model(toy.decoder, preferred="toy") == toy


def test_a_file_that_was_replaced_is_read_again(toy, tmp_path):
    assert find_model("toy").encoder == toy.encoder
    os.utime(toy.path, ns=(0, 0))  # clocks of file systems may be coarse
    other = other_encoder(tmp_path, "toy", "toy")
    assert other.path == toy.path and find_model("toy") == other != toy
    (tmp_path / "toy.safetensors").write_bytes(b"damaged")
    check_rejects(ModelNotFound, "toy", find_model, "toy")


def test_what_an_archive_brought_comes_last_and_has_no_name(toy, tmp_path, monkeypatch):
    config.set(cache=tmp_path / "cache")
    brought = other_encoder(tmp_path / "cache")
    assert find_model(toy.decoder) == find_model(toy.decoder, preferred="other") == toy
    (tmp_path / "toy.safetensors").unlink()
    assert find_model(toy.decoder) == find_model(toy.decoder, preferred="other") == brought


def test_identities_tell_parts_apart():
    decoder, head = identities(arrays(), ARCHITECTURE, VOCABULARY)
    changed = arrays()
    changed["encoder.b"] *= 2
    assert identities(changed, ARCHITECTURE | {"analysis_widths": [9, 9]}, VOCABULARY) == (decoder, head)
    changed = arrays()
    changed["decoder.a"][0, 0] = 1
    assert identities(changed, ARCHITECTURE, VOCABULARY)[0] != decoder
    assert identities(changed, ARCHITECTURE, VOCABULARY)[1] == head
    assert identities(arrays(), ARCHITECTURE, Vocabulary(("Rock", "Sand")))[1] != head
    assert identities(arrays(), ARCHITECTURE, Vocabulary(("Rock", "Sand")))[0] == decoder
    # the same bytes under another shape are another model
    changed = arrays()
    changed["decoder.a"] = changed["decoder.a"].reshape(3, 2)
    assert identities(changed, ARCHITECTURE, VOCABULARY)[0] != decoder


def test_missing_model_names_every_place(tmp_path, monkeypatch):
    config.set(model_path=tmp_path)
    message = check_rejects(ModelNotFound, "'nowhere'", find_model, "nowhere")
    assert str(tmp_path) in message and str(PACKAGED) in message and "DEEPSIC_MODEL_PATH" in message
    check_rejects(ModelNotFound, "decoder " + "5" * 64, find_model, "5" * 64)
    check_rejects(ModelNotFound, "head 12345678", find_model, "base", head="12345678")


def test_a_file_that_is_missing_or_no_file(toy, tmp_path):
    check_rejects(
        ModelNotFound, "nix.safetensors: |No such file|pass the path", read_info, tmp_path / "nix.safetensors"
    )
    check_rejects(ModelNotFound, "Is a directory", read_info, tmp_path)
    check_rejects(ModelNotFound, "without .safetensors", find_model, "nix.safetensors")
    (tmp_path / "a.safetensors").symlink_to("nowhere")
    assert find_model("toy") == toy
    os.unlink(toy.path)
    check_rejects(ModelNotFound, toy.path, load_arrays, toy)


def test_every_flipped_byte_of_the_tensors_is_noticed(toy):
    data = bytearray(Path(toy.path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    offsets = json.loads(data[8:start])
    for name in ("decoder.a", "decoder.number", "head.c"):
        low, high = offsets[name]["data_offsets"]
        for at in range(low, high):
            broken = bytearray(data)
            broken[start + at] ^= 1
            Path(toy.path).write_bytes(broken)
            check_rejects(ModelMismatch, "SHA-256", load_arrays, toy)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, b"\x10" + bytes(7) + b"x" * 16, b"\x02" + bytes(7) + b"{}", (1 << 40).to_bytes(8, "little")],
)
def test_foreign_files_are_refused_and_passed_over(tmp_path, monkeypatch, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    check_rejects(ModelMismatch, "not a DeepSIC model", read_info, path)
    config.set(model_path=tmp_path)
    assert find_model("base").name == ALIASES["base"].name


def test_truncated_file_is_refused(toy, tmp_path):
    short = tmp_path / "short.safetensors"
    shutil.copy(toy.path, short)
    with open(short, "r+b") as file:
        file.truncate(short.stat().st_size - 5)
    check_rejects(ModelMismatch, "damaged", read_info, short)
    check_rejects(ModelMismatch, "damaged", load_arrays, replace(toy, path=str(short)))


def test_an_alias_is_one_packaged_model(monkeypatch):
    alias = ALIASES["base"]
    info = find_model("base")
    assert (info.name, info.decoder, info.head) == (alias.name, alias.decoder, alias.head)
    assert alias.name == f"base-{alias.decoder[:8]}" and Path(info.path) == PACKAGED / f"{alias.name}.safetensors"
    names = [alias.name, *HEAD_ALIASES.values()]
    assert sorted(path.name for path in PACKAGED.iterdir()) == sorted(f"{name}.safetensors" for name in names)
    monkeypatch.setattr("deepsic_codec.model.zoo.read_file", None)  # no file is read
    assert resolve("base") == (alias.decoder, alias.head)


def test_an_alias_is_not_taken_by_another_file(toy, tmp_path):
    save_model(tmp_path / "base.safetensors", "base", arrays(), ARCHITECTURE, VOCABULARY, {})
    assert find_model("base").decoder == ALIASES["base"].decoder
    assert find_model(ALIASES["base"].decoder, preferred="base").name == ALIASES["base"].name
    assert resolve("toy") == (toy.decoder, toy.head)


def test_finding_needs_no_torch():
    check_lazy("from deepsic_codec.model.zoo import find_model; find_model('base').vocabulary.names")


def test_broader_names_stay_with_all_their_classes():
    words = Vocabulary(("a", "b", "c"), {"one": ("a",), "two": ("a", "b"), "all": ("a", "b", "c")})
    assert words.parents_among(["b", "a"]) == {"one": ("a",), "two": ("a", "b")}
