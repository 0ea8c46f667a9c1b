"""Ways in from outside: the command line, and a process that cannot import torch."""

import json

import numpy as np
import pytest
import zarr
from PIL import Image

import deepsic_codec
from deepsic_codec import consolidate_labels
from deepsic_codec.cli.main import main
from deepsic_codec.errors import LabelIndexError
from tests import stub_runtime
from tests.common import run_python
from tests.labels.common import archive, fill
from tests.labels.test_similarity import archive as archive_with_embeddings


@pytest.fixture
def folder(stub, tmp_path):
    path = tmp_path / "archive.zarr"
    archive(zarr.storage.LocalStore(path), shape=(128, 200, 3), chunks=(64, 64, 3))[:] = 200
    consolidate_labels(path)
    return path


def run(capsys, *arguments):
    status = main([str(one) for one in arguments])
    return status, *capsys.readouterr()


def test_query(folder, capsys, tmp_path):
    status, out, _ = run(capsys, "query", folder, "Bright > 0.6 & ~Dark")
    assert status == 0 and "6 of 8 chunks; read" in out and "1.2.0" in out and "64:128, 128:192, 0:3" in out
    status, out, _ = run(capsys, "query", folder, "Bright", "--json", "--export", tmp_path / "out", "--as", "tiff")
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0] == {"chunk": [0, 0, 0], "region": [[0, 64], [0, 64], [0, 3]]} and len(lines) == 6
    assert len(list((tmp_path / "out").iterdir())) == 6
    assert (np.asarray(Image.open(tmp_path / "out" / "img_1_2_0.tiff")) == 200).all()
    out = run(capsys, "query", folder, "~Bright", "--json", "--tiles", "--verify", "all")[1]  # padded with black
    assert [json.loads(line)["region"][1] for line in out.splitlines()] == [[192, 200]] * 2


def test_query_mistakes_point_to_the_place(folder, capsys):
    status, _, err = run(capsys, "query", folder, "Bright & Drak")
    assert status == 2
    assert err.splitlines() == [
        "deepsic query: error: no class 'Drak'; did you mean Dark?",
        "  Bright & Drak",
        "           ^",
    ]


def test_long_vocabularies_are_told_in_short(stub, tmp_path, monkeypatch, capsys):
    """Parents by their direct members, and no classes that no chunk shows."""
    parents = {"Visible": ("Dim", "Bright"), "Anything": ("Visible", "Dark")}
    vocabulary = stub_runtime.Vocabulary((*stub_runtime.SHADES, *(f"Other{n}" for n in range(20))), parents)
    times = stub_runtime.ModelInfo("base", "ab" * 32, "ef" * 32, vocabulary)
    monkeypatch.setattr(stub_runtime, "MODELS", (times,))
    archive(zarr.storage.LocalStore(tmp_path), shape=(64, 64, 3), chunks=(64, 64, 3))[:] = 200
    consolidate_labels(tmp_path)
    lines = run(capsys, "labels", tmp_path)[1].splitlines()
    assert next(line for line in lines if line.startswith("Anything")).endswith("Visible | Dark")
    assert all(line.split()[1] != "0" for line in lines[2:-1]) and "classes in no chunk" in lines[-1]


def test_labels_and_index(folder, capsys, tmp_path):
    assert "8 chunks: 8 labelled in their headers" in run(capsys, "labels", folder)[1]
    assert json.loads(run(capsys, "labels", folder, "--json", "--scan")[1])["classes"]["Bright"] == 6
    picture = tmp_path / "map.png"
    assert run(capsys, "labels", folder, "--map", "Visible", "--out", picture)[0] == 0
    values = np.asarray(Image.open(picture))
    assert values.shape == (256, 512, 2) and values[0, 0].tolist() == [200, 255]
    assert "8 chunks: 8 labelled" in run(capsys, "index", folder)[1]
    status, _, err = run(capsys, "query", folder, "Bright", "--index", tmp_path / "nothing")
    assert status == 1 and "no label index" in err


def test_names_of_the_package():
    for name in deepsic_codec.__all__:
        assert getattr(deepsic_codec, name) is not None
    assert issubclass(LabelIndexError, LookupError)


def test_a_query_needs_no_torch_and_decodes_nothing(stub, tmp_path):
    path = tmp_path / "a.zarr"
    array = archive(zarr.storage.LocalStore(path), shape=(300, 300, 3))
    fill(array, seed=11)
    expected = consolidate_labels(array).where("Dark > 0.6 & ~Visible").chunks
    (path / "img_labels").rename(path / "old")
    printed = run_python(
        f"""
        import sys
        sys.modules["torch"] = None  # so that importing it fails
        from deepsic_codec import consolidate_labels, iter_chunk_attrs, open_labels
        from deepsic_codec.codec.decode import PayloadToDecode
        from deepsic_codec.codec.batching import Batcher

        def never(*args, **kwargs):
            raise AssertionError("decoded")

        PayloadToDecode.__init__ = Batcher.submit = Batcher.submit_async = never
        path = {str(path)!r}
        assert len(list(iter_chunk_attrs(open_labels(path, scan=True).array))) == 9
        made = consolidate_labels(path)["img"]
        labels = open_labels(path)
        found = labels.where("Dark > 0.6 & ~Visible", verify="all", tiles=True)
        assert found.regions and labels.summary() and labels.map("Visible").shape == (5, 5)
        assert labels.where("Dark & Dim & Bright").bytes_read
        print(found.chunks)
        """
    )
    assert printed.strip() == str(expected)


def test_look_alikes_and_learned_labels_need_no_torch_and_decode_nothing(stub, tmp_path):
    path = tmp_path / "a.zarr"
    array = archive_with_embeddings(zarr.storage.LocalStore(path))
    expected = consolidate_labels(array).similar((0, 0, 0), 3).chunks
    printed = run_python(
        f"""
        import sys
        sys.modules["torch"] = None  # so that importing it fails
        from deepsic_codec.cli.main import main
        from deepsic_codec.codec.batching import Batcher
        from deepsic_codec.codec.decode import PayloadToDecode
        from deepsic_codec import open_labels
        from deepsic_codec.model import zoo

        def never(*args, **kwargs):
            raise AssertionError("decoded")

        PayloadToDecode.__init__ = Batcher.submit = Batcher.submit_async = zoo.find_model = never
        path = {str(path)!r}
        print(open_labels(path, mode="r+").similar((0, 0, 0), 3).chunks)
        for arguments in (
            ["similar", path, "--chunk", "0.0.0", "--json"],
            ["learn", path, "night", "--like", "0.0.0", "--unlike", "1.1.0"],
            ["suggest", path, "night", "-k", "2"],
            ["query", path, "night", "--tiles"],
        ):
            assert main(arguments) == 0
        labels = open_labels(path, mode="r+")
        labels.learn("day", like=[(1, 1, 0)], unlike=[(0, 0, 0)])
        assert labels.suggest("day", 2).regions and labels.where("day").count and labels.map("day").any()
        """
    )
    assert printed.splitlines()[0] == str(expected)
