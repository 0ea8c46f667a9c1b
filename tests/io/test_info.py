import json

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, consolidate_labels, create_array
from deepsic_codec.errors import ConfigurationError, LabelIndexError, UnsupportedArray
from deepsic_codec.io import info
from deepsic_codec.io.info import describe, expected_error
from deepsic_codec.payload.constants import quality_step
from tests.common import check_lazy, check_rejects, photograph


@pytest.fixture
def place(stub, tmp_path):
    """Four chunks: one missing, the others 10, 120 and 250 everywhere; a plain array beside it."""
    path = tmp_path / "a.zarr"
    root = zarr.open_group(path)
    array = create_array(path, name="img", shape=(128, 192, 3), chunks=(64, 96, 3), dtype="u1", fill_value=7)
    for (y, x), value in {(0, 0): 10, (0, 96): 120, (64, 0): 250}.items():
        array[y : y + 64, x : x + 96] = value
    root.create_array("other", shape=(4,), dtype="f4")
    return path


def test_a_group_lists_what_is_in_it(place):
    found = describe(place)
    assert json.loads(json.dumps(found)) == found
    assert found["kind"] == "group" and [one["path"] for one in found["arrays"]] == ["img"]
    assert [(one["path"], one["shape"]) for one in found["other_arrays"]] == [("other", [4])]
    create_array(place, name="second", shape=(8, 8, 3), dtype="u1")
    check_rejects(ConfigurationError, "one array|img, second", describe, place, index="x.zarr")


def test_the_index_of_a_group_of_one_array_is_that_of_the_array(place, tmp_path):
    consolidate_labels(place, "img", index=tmp_path / "index.zarr")
    about = describe(place, index=tmp_path / "index.zarr")
    assert about == describe(place, "img", index=tmp_path / "index.zarr") | {"read": about["read"]}
    assert about["kind"] == "array" and about["labels"]["from"] == "index"


def test_a_group_lists_its_index(place):
    consolidate_labels(place, "img")
    consolidate_labels(place, "img")
    found = describe(place)
    assert found["label_indices"] == ["img_labels"] and len(found["other_arrays"]) == 1


def test_an_array_is_counted_exactly(place):
    found = describe(place, "img")
    assert found["kind"] == "array" and found["exact"]
    assert found["chunks"] == {"total": 4, "stored": 3, "missing": 1, "headers_read": 4}
    files = [file for file in (place / "img" / "c").rglob("*") if file.is_file()]
    nbytes = sum(file.stat().st_size for file in files)
    assert len(files) == 3 and found["size"]["bytes"] == nbytes
    assert found["size"]["bpp"] == pytest.approx(8 * nbytes / (3 * 64 * 96))
    assert found["size"]["ratio"] == pytest.approx(3 * 64 * 96 * 3 / nbytes)
    assert sum(found["size"]["parts"].values()) == pytest.approx(1)
    assert found["model"]["installed"] and found["written_by"][0]["chunks"] == 3
    assert found["labels"]["from"] == "headers"
    assert {name: count for name, count in found["labels"]["classes"].items() if count} == {
        "Dark": 1,
        "Dim": 1,
        "Bright": 1,
        "Visible": 2,
    }
    assert found["read"]["requests"] <= 4 + 6 and found["read"]["bytes"] < 4 * 256 + 3000


def test_bytes_of_cut_chunks_are_per_pixel_of_the_array(stub):
    array = create_array({}, data=photograph(100, 130, 3), chunks=(64, 64, 3))
    found = describe(array)
    assert found["size"]["bpp"] == pytest.approx(8 * found["size"]["bytes"] / (100 * 130))


def test_the_index_answers_for_what_was_not_read(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(info, "MAX_HEADERS", 3)
    array = create_array(tmp_path / "b.zarr", name="img", data=photograph(300, 260, 3), chunks=(64, 64, 3))
    sampled = describe(array)
    assert not sampled["exact"] and sampled["chunks"]["headers_read"] == 3 and sampled["chunks"]["total"] == 25
    exact = describe(array, everything=True)
    assert exact["exact"] and exact["chunks"]["headers_read"] == 25
    assert sampled["size"]["bytes"] == pytest.approx(exact["size"]["bytes"], rel=0.3)
    consolidate_labels(array)
    indexed = describe(array)
    assert indexed["exact"] and indexed["chunks"]["headers_read"] == 3 and indexed["labels"]["from"] == "index"
    assert indexed["size"]["bytes"] == exact["size"]["bytes"]
    assert indexed["size"]["bpp"] == pytest.approx(exact["size"]["bpp"])
    assert indexed["labels"]["classes"] == exact["labels"]["classes"]
    check_rejects(LabelIndexError, "nowhere", describe, array, index=tmp_path / "nowhere")


@pytest.mark.parametrize("shards", [None, (128, 128, 3)])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_both_formats_and_shards(stub, tmp_path, zarr_format, shards):
    if shards and zarr_format == 2:
        return
    store = zarr.storage.ZipStore(tmp_path / "c.zip", mode="w")
    data = photograph(128, 128, 3)
    create_array(store, name="img", data=data, chunks=(64, 64, 3), shards=shards, zarr_format=zarr_format)
    store.close()
    found = describe(str(tmp_path / "c.zip"), "img")
    assert found["zarr_format"] == zarr_format and found["chunks"]["stored"] == 4
    assert found["shard_shape"] == (None if shards is None else list(shards))


def test_post_semantics_and_none_say_why_there_are_no_labels(stub):
    for semantics, words in {"post": "deepsic index", "none": "without labels"}.items():
        array = create_array({}, data=photograph(64, 64, 3), codec=DeepSIC(semantics=semantics))
        labels = describe(array)["labels"]
        assert labels["from"] is None and words in labels["note"]


def test_other_writers_show(stub):
    array = create_array({}, data=photograph(64, 128, 3), chunks=(64, 64, 3), codec=DeepSIC(quality=30))
    payload = DeepSIC(quality=80, model="other").encode(photograph(64, 64, 3))
    array.store._store_dict["c/0/0/0"] = zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(payload)
    writers = {writer["quality"]: writer["decoder"] for writer in describe(array)["written_by"]}
    assert writers == {30: "ab" * 8, 80: "12" * 8}


def test_errors_in_units_of_the_data(stub):
    plain = expected_error(DeepSIC(quality=50), np.dtype("u1"))
    assert plain["step"] == quality_step(50) and plain["unit"] == 1
    assert plain["rms"] == pytest.approx(quality_step(50) / 12**0.5)
    assert expected_error(DeepSIC(quality=50), np.dtype("u2"))["unit"] == 257
    assert expected_error(DeepSIC(quality=50, value_range=[1000, 3550]), np.dtype("u2"))["unit"] == 10
    each = expected_error(DeepSIC(value_range=[[0, 255], [0, 510], [0, 765]]), np.dtype("u2"))
    assert each["unit"] == [1, 2, 3]
    assert expected_error(DeepSIC(value_range="chunk"), np.dtype("u2"))["unit"] is None


def test_a_psnr_says_what_the_error_is(stub):
    error = expected_error(DeepSIC(psnr=40), np.dtype("u2"), quality=60.0)
    assert error["rms"] == pytest.approx(2.55) and error["unit"] == 257
    assert error["step"] == quality_step(60) and expected_error(DeepSIC(psnr=40), np.dtype("u1"))["step"] is None


def test_measured_ranges_come_from_headers(stub):
    data = photograph(64, 64, 3).astype("u2") * 40 + 1000
    array = create_array({}, data=data, codec=DeepSIC(value_range="chunk"))
    unit = describe(array)["error"]["unit"]
    extents = [float(np.ptp(data[..., band])) / 255 for band in range(3)]
    np.testing.assert_allclose(unit, extents, rtol=0.05)


def test_nothing_there(tmp_path):
    check_rejects(UnsupportedArray, "no array or group", describe, str(tmp_path / "nothing"))


def test_info_needs_no_torch(tmp_path):
    check_lazy(
        """
        from deepsic_codec.cli.main import main
        import zarr
        zarr.open_group("memory://x", mode="w")
        assert main(["info", "memory://x"]) == 0
    """,
        unwanted=("torch", "matplotlib", "imagecodecs"),
    )
