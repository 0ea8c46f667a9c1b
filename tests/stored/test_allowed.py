"""Codecs and dtypes that are read of any archive, and those that are refused by name."""

import json
import pickle

import numpy as np
import pytest
import zarr
from numcodecs import Base64, Delta, Zstd

from deepsic_codec import config, consolidate_labels, create_array, open_archive, open_labels
from deepsic_codec.cli.main import main
from deepsic_codec.errors import RefusedCodec
from deepsic_codec.io.zarr_source import open_zarr
from deepsic_codec.stored.allowed import ALLOWED, check_codecs
from tests.common import check_rejects, photograph

pytestmark = pytest.mark.usefixtures("stub")

PIXELS = photograph(64, 64, 3)
CALLS = []


class Marks:
    """Leaves a mark when it is unpickled, as any code of a stranger could."""

    def __reduce__(self):
        return CALLS.append, ("unpickled",)


@pytest.fixture(autouse=True)
def unpickling(monkeypatch):
    """Pickles are allowed, as in releases of numcodecs that do not ask."""
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    CALLS.clear()
    yield
    assert not CALLS


def change(folder, **changes):
    """Change metadata of an array of format 2."""
    metadata = json.loads((folder / ".zarray").read_text())
    (folder / ".zarray").write_text(json.dumps(metadata | changes))


@pytest.fixture
def archive(tmp_path):
    create_array(str(tmp_path / "a.zarr"), name="image", data=PIXELS, chunks=(64, 64, 3), zarr_format=2)
    return tmp_path / "a.zarr"


OBJECTS = {"dtype": "|O", "fill_value": "", "compressor": None, "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}]}


def test_an_index_cannot_name_pickle(archive, capsys):
    consolidate_labels(str(archive), "image")
    index = archive / "image_labels"
    for path in index.rglob(".zmetadata"):
        path.unlink()
    for array in {path.parent for path in index.rglob(".zarray")}:
        change(array, **OBJECTS)
        for chunk in array.iterdir():
            if not chunk.name.startswith("."):
                chunk.write_bytes(pickle.dumps(Marks()))
    check_rejects(RefusedCodec, "image_labels", open_labels, str(archive), "image")
    for words in (["info"], ["labels"], ["query"]):
        assert main([*words, str(archive), *["Dark"][: words == ["query"]]]) in (0, 1)
    assert "'vlen-utf8', which is not read" in capsys.readouterr().err
    assert open_labels(str(archive), "image", scan=True).vocabulary
    consolidate_labels(str(archive), "image")
    assert open_labels(str(archive), "image").summary()["header"] > 0


def test_a_filter_before_deepsic_is_refused_when_the_array_is_opened(archive):
    change(archive / "image", filters=[{"id": "base64"}])
    words = "'image'|'base64'|config.set(allowed_codecs=['base64'])|DEEPSIC_ALLOWED_CODECS=base64"
    for name in ("image", None):
        check_rejects(RefusedCodec, words, open_archive, str(archive), name)
    with config.set(allowed_codecs="base64, zfpy"):
        assert open_archive(str(archive), "image").shape == PIXELS.shape


def test_sources_of_other_codecs(tmp_path):
    array = zarr.create_array(
        str(tmp_path / "b.zarr"), shape=(8, 8), chunks=(8, 8), dtype="u1", zarr_format=2, filters=[Base64()]
    )
    check_rejects(RefusedCodec, "base64", lambda: list(open_zarr(tmp_path / "b.zarr", "b", "yx")))
    with config.set(allowed_codecs=["base64"]):
        check_codecs(array)
        assert [source.name for source in open_zarr(tmp_path / "b.zarr", "b", "yx")] == ["b"]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("u1", {}),
        ("f4", {"filters": None, "compressors": None}),
        (">u2", {"compressors": Zstd(), "filters": [Delta(">u2", astype="<i4")]}),
    ],
)
def test_usual_arrays_are_read(dtype, options):
    check_codecs(zarr.create_array({}, shape=(4, 4), dtype=dtype, zarr_format=2, **options))


@pytest.mark.parametrize("dtype", ["<U3", "S3", "datetime64[s]", "object", [("a", "u1")]])
def test_other_dtypes_are_refused(dtype):
    class Stranger:
        path, metadata = "a", zarr.create_array({}, shape=(4,), dtype="u1", zarr_format=2).metadata

    Stranger.dtype = np.dtype(dtype)
    check_rejects(RefusedCodec, "'a'|expected numbers", check_codecs, Stranger)


def test_a_dtype_of_a_codec_is_checked():
    array = zarr.create_array({}, shape=(4,), dtype="u1", zarr_format=2, filters=[Delta("u1")])
    array.metadata.filters[0].astype = np.dtype("O")
    check_rejects(RefusedCodec, "'delta', astype", check_codecs, array)


def test_codecs_within_shards():
    array = zarr.create_array({}, shape=(4, 4), dtype="u1", chunks=(2, 2), shards=(4, 4))
    check_codecs(array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepsic_codec.stored.allowed.ALLOWED", ALLOWED - {"crc32c"})
        check_rejects(RefusedCodec, "crc32c", check_codecs, array)
