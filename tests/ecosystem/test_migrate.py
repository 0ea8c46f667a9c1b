"""An archive of format 2 that is read as format 3: same pixels, same labels, not one byte of a chunk changed."""

import json
import warnings

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import DeepSIC, consolidate_labels, create_array, open_archive, open_labels
from deepsic_codec.errors import UnsupportedArray
from examples.migrate import array_document, main, migrate
from tests.common import check_rejects, photograph

pytestmark = pytest.mark.usefixtures("stub")

COMPRESSORS = [None, numcodecs.Zstd(), numcodecs.GZip(), *(numcodecs.Blosc(shuffle=n) for n in (-1, 0, 1, 2))]


def chunks_in(folder):
    """Contents of everything that is not metadata."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name != "zarr.json" and not path.name.startswith(".z")
    }


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "old.zarr"
    for name, axes, shape, chunks in (
        ("image", "yxc", (130, 200, 3), (64, 64, 3)),
        ("deep/grey", "tyx", (3, 70, 60), (1, 64, 64)),
    ):
        codec = DeepSIC(axes=axes)
        z = create_array(path, name=name, shape=shape, chunks=chunks, dtype="u1", codec=codec, zarr_format=2)
        z[...] = photograph(*shape)
    consolidate_labels(path, "image")
    return path


def test_pixels_labels_and_chunks_stay(folder):
    before = chunks_in(folder)
    images = {name: zarr.open(folder / name, mode="r")[...] for name in ("image", "deep/grey")}
    queried = open_labels(folder, "image").where("Bright | Dim").chunks
    attributes = dict(zarr.open(folder / "image", mode="r").attrs)
    found = migrate(folder, remove=True)
    assert [node.path for node in found][-2:] == ["image_labels", ""]
    assert chunks_in(folder) == before and not list(folder.rglob(".z*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = zarr.open_group(folder, mode="r", zarr_format=3)
    for name, pixels in images.items():
        assert root[name].metadata.zarr_format == 3
        np.testing.assert_array_equal(root[name][...], pixels)
    assert root["image"].metadata.dimension_names == ("y", "x", "c")
    del attributes["_ARRAY_DIMENSIONS"]
    assert dict(root["image"].attrs) == attributes
    assert len(queried) and open_labels(folder, "image").where("Bright | Dim").chunks == queried


def test_dry_run_writes_nothing(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    planned = migrate(folder, dry_run=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert migrate(folder) == planned
    assert migrate(folder) == planned  # again, as after an interruption
    assert {path: data for path, data in before.items() if path.read_bytes() != data} == {}


def test_both_formats_are_there_until_the_old_one_is_removed(folder):
    migrate(folder, "image")
    with pytest.warns(UserWarning, match="[Bb]oth"):
        assert open_archive(folder / "image").metadata.zarr_format == 3
    assert zarr.open(folder, mode="r", zarr_format=2)["image"].metadata.zarr_format == 2  # the group was not migrated


def test_writing_after_migration_replaces_chunks_under_their_keys(folder):
    migrate(folder, remove=True)
    keys = set(chunks_in(folder / "image"))
    z = zarr.open(folder / "image", mode="r+")
    z[...] = 77
    assert set(chunks_in(folder / "image")) == keys and (zarr.open(folder / "image", mode="r")[...] == 77).all()


@given(st.data())
def test_any_array_of_format_2(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from(["|b1", "|u1", "<u2", ">u2", "<i4", "<f4", ">f8", "<c8"]))
    options = {
        "chunks": tuple(data.draw(st.integers(1, size)) for size in shape),
        "order": data.draw(st.sampled_from("CF")),
        "dimension_separator": data.draw(st.sampled_from("./")),
        "compressor": data.draw(st.sampled_from(COMPRESSORS)),
        "fill_value": data.draw(st.sampled_from([None, 0, 1] + ([np.nan, np.inf] if dtype[1] == "f" else []))),
    }
    store = zarr.storage.MemoryStore()
    z = zarr.create(store=store, shape=shape, dtype=dtype, zarr_format=2, **options)
    z[: shape[0] // 2 + 1] = np.arange(np.prod(shape)).reshape(shape)[: shape[0] // 2 + 1].astype(dtype)
    before = z[...]
    migrate(store)
    again = zarr.open_array(store, mode="r", zarr_format=3)
    assert again.metadata.zarr_format == 3 and again.dtype == before.dtype.newbyteorder("=")
    np.testing.assert_array_equal(again[...], before)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("where", ["compressor", "filter"])
def test_memory_order_and_place_of_the_codec(order, where):
    codec = {"compressor": DeepSIC()} if where == "compressor" else {"filters": [DeepSIC()], "compressor": None}
    store, array = zarr.storage.MemoryStore(), photograph(40, 31, 3)
    options = {"dtype": "u1", "zarr_format": 2, "order": order, "fill_value": 9, **codec}
    z = zarr.create(store=store, shape=array.shape, chunks=(16, 20, 3), **options)
    z[:20] = array[:20]
    expected = z[...]
    migrate(store)
    again = zarr.open_array(store, mode="r", zarr_format=3)
    np.testing.assert_array_equal(again[...], expected)
    assert again.fill_value == 9


def test_what_format_3_cannot_say_is_refused_before_anything_is_written(folder):
    zarr.create(
        store=folder / "odd", shape=(8,), dtype="i4", zarr_format=2, filters=[numcodecs.Delta("i4")], compressor=None
    )
    check_rejects(UnsupportedArray, "'odd'|'delta'|copy", migrate, folder)
    assert not list(folder.rglob("zarr.json"))
    base = json.loads((folder / "image" / ".zarray").read_text())
    for change, words in (
        ({"dtype": [["a", "<i4"]]}, "data type"),
        ({"dtype": "<M8[ns]"}, "M8"),
        ({"compressor": {"id": "lzma"}}, "'lzma'"),
    ):
        check_rejects(UnsupportedArray, f"{words}|'x'", array_document, {**base, **change}, {}, "x")


def test_other_documents_are_not_overwritten(folder):
    migrate(folder, "image")
    path = folder / "image" / "zarr.json"
    changed = {**json.loads(path.read_text()), "attributes": {"kept": True}}
    path.write_text(json.dumps(changed))
    check_rejects(UnsupportedArray, "image/zarr.json|differs", migrate, folder)
    assert json.loads(path.read_text()) == changed


def test_nothing_to_migrate(tmp_path):
    create_array(tmp_path / "new.zarr", data=photograph(64, 64, 3))
    check_rejects(UnsupportedArray, "no array or group of Zarr format 2", migrate, tmp_path / "new.zarr")


def test_script(folder, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["migrate.py", str(folder), *arguments])
        main()
        return capsys.readouterr().out

    assert "would write image/zarr.json: array deepsic\n" in run("--dry-run")
    assert not list(folder.rglob("zarr.json"))
    assert "wrote image/zarr.json: array deepsic\n" in run("--name", "image")
    out = run("--remove")
    assert "wrote zarr.json: group\n" in out and out.endswith("metadata of format 2 is gone\n")
    with pytest.raises(SystemExit, match="nothing to migrate"):
        run()
