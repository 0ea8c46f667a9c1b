"""The committed fixtures decode to the stored digests, and are what the current code makes."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from deepsic_codec import DeepSIC, config
from deepsic_codec.model import file, zoo
from deepsic_codec.payload.fields import FORMAT_VERSION
from tests.common import ROOT
from tests.fixtures import make

VERSIONS = sorted(path for path in make.HERE.glob("v*") if path.is_dir())


def named(kind, suffix):
    found = [path for version in VERSIONS for path in sorted((version / kind).glob(f"*{suffix}"))]
    return pytest.mark.parametrize("path", found, ids=[f"{p.parts[-3]}-{p.name.split('.')[0]}" for p in found])


@pytest.fixture(autouse=True)
def models(monkeypatch, tmp_path):
    """Models have to be in the package, or embedded in the arrays."""
    config.set(model_path=(), cache=tmp_path / "cache")


def test_payloads_decode_without_torch():
    code = "import sys; sys.modules['torch'] = None; from tests.fixtures.make import main; sys.exit(main(['--decode']))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert run.returncode == 0 and "0 differences" in run.stdout, run


def test_payloads_that_decode_to_others_are_named(tmp_path):
    for suffix in (".dsic", ".json"):
        (tmp_path / "payloads").mkdir(exist_ok=True)
        shutil.copy(make.folder_of() / "payloads" / f"lossless{suffix}", tmp_path / "payloads")
    assert make.decoding_differences(tmp_path) == []
    stored = tmp_path / "payloads" / "lossless.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "decoded": "0" * 64}))
    assert make.decoding_differences(tmp_path) == ["lossless: decoded"]


def test_a_frozen_format_has_fixtures():
    assert make.folder_of().is_dir(), "python -m tests.fixtures.make"
    assert [path.name for path in VERSIONS] == [f"v{n}" for n in range(1, FORMAT_VERSION + 1)]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_no_file_was_changed(folder):
    check_manifest(folder)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_models_are_there(folder):
    check_models(folder)


@named("payloads", ".dsic")
def test_payload(path):
    check_payload(path)


@named("arrays", ".zarr.zip")
def test_array(path):
    check_array(path)


def check_manifest(folder):
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    there = {str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert there == set(listed)
    for name, wanted in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == wanted, name


def check_models(folder):
    for model in json.loads((folder / "models.json").read_text()).values():
        info = zoo.find_model(model["decoder"])
        assert info.decoder == model["decoder"]
        file.load_arrays(info)


def check_payload(path):
    payload, wanted = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    config = wanted.pop("config")
    config.pop("id")
    found = make.what_a_payload_holds(DeepSIC.from_config(config), payload)
    close(found, wanted)


def check_array(path):
    wanted = json.loads(path.with_suffix(".json").read_text())
    with ZipStore(path, mode="r") as store:
        array = zarr.open_array(store, path="group/image", mode="r")
        close(make.what_an_array_holds(array), wanted)


def close(found, wanted):
    """Equal, but for labels that a float head computes."""
    for held in (found, wanted):
        held["computed"] = np.asarray(held.get("computed", [0]))
    np.testing.assert_allclose(found.pop("computed"), wanted.pop("computed"), atol=3)
    assert found == wanted


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All fixtures as the current code writes them."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("fixtures") / "made"
    make.make_all(folder)
    return folder


def test_fixtures_are_what_the_current_code_makes(made):
    assert make.differences(make.folder_of(), made) == [], "python -m tests.fixtures.make"


def test_what_is_written_now_is_found_again(made):
    check_manifest(made)
    check_models(made)
    for name in ("colour-q50", "labels-pre", "labels-post", "fortran", "pixel"):
        check_payload(made / "payloads" / f"{name}.dsic")
    for name in ("format-2", "shards", "embedded"):
        check_array(made / "arrays" / f"{name}.zarr.zip")


def test_other_fixtures_than_the_code_makes_are_named(made, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "v1"
    shutil.copytree(made, folder)
    monkeypatch.setattr(make, "make_all", lambda place: bool(shutil.copytree(made, place)))
    assert make.main(["--check", "--out", str(folder)]) == 0
    payload, text = (folder / "payloads" / name for name in ("pixel.dsic", "colour-q50.json"))
    payload.write_bytes(payload.read_bytes()[:-1] + b"x")
    held = json.loads(text.read_text())
    text.write_text(json.dumps({**held, "symbols": "0" * 64}))
    labels = folder / "payloads" / "labels-post.json"
    held = json.loads(labels.read_text())
    labels.write_text(json.dumps({**held, "computed": [score + 9 for score in held["computed"]]}))
    (folder / "arrays" / "edges.zarr.json").unlink()
    archive = folder / "arrays" / "shards.zarr.zip"
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("group/image/more", b"x")
    assert make.main(["--check", "--out", str(folder)]) == 1
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted(names) == [
        "arrays/edges.zarr.json", "arrays/shards.zarr.zip", "payloads/colour-q50.json", "payloads/labels-post.json",
        "payloads/pixel.dsic",
    ]  # fmt: skip
    assert make.main(["--out", str(folder)]) == 0 and make.differences(folder, made) == []


@pytest.mark.parametrize("field", ["symbols", "payload", "order", "quality", "labels", "decoded_order"])
def test_a_difference_is_found(made, tmp_path, field):
    path = made / "payloads" / "labels-pre.dsic"
    wanted = json.loads(path.with_suffix(".json").read_text())
    wanted[field] = {"tile": [64, 64], "digest": "0" * 64} if field == "labels" else "another"
    copy = Path(tmp_path / path.name)
    copy.write_bytes(path.read_bytes())
    copy.with_suffix(".json").write_text(json.dumps(wanted))
    with pytest.raises(AssertionError):
        check_payload(copy)


def test_a_changed_file_is_found(made, tmp_path):
    folder = tmp_path / "v9"
    shutil.copytree(made, folder)
    check_manifest(folder)
    extra = folder / "payloads" / "extra.dsic"
    extra.write_bytes(b"x")
    with pytest.raises(AssertionError):
        check_manifest(folder)
    extra.unlink()
    path = folder / "payloads" / "pixel.dsic"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AssertionError):
        check_manifest(folder)


def test_digests_tell_arrays_apart():
    array = np.arange(12, dtype="<u2").reshape(3, 4)
    same = [array.astype(">u2"), np.asfortranarray(array), array[::1]]
    assert {make.digest(other) for other in same} == {make.digest(array)}
    others = [array.T, array.reshape(4, 3), array.astype("i2"), array.astype("u4"), array[::-1]]
    assert make.digest(array) not in {make.digest(other) for other in others}
