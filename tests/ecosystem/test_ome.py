"""Image pyramids: what `deepsic ingest --ome` writes is OME-Zarr to those who read it, and its chunks are DeepSIC's."""

import dask.array as da
import numpy as np
import pytest
import zarr
from PIL import Image

from deepsic_codec import DeepSIC, consolidate_labels, create_array, open_archive, open_labels
from deepsic_codec.cli.main import main
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.io.images import ImageSource
from deepsic_codec.io.ome import describe, pyramid
from deepsic_codec.stored.location import open_node
from tests.common import check_rejects, photograph

pytestmark = pytest.mark.usefixtures("stub")


def source(shape, axes, dtype="u1", seed=0, **attributes):
    values = photograph(*shape, seed=seed).astype(dtype)
    return ImageSource("image", da.from_array(values, chunks=50), axes, attributes)


def read(path):
    """Levels of an image as ome-zarr-py reads them, and its metadata."""
    pytest.importorskip("ome_zarr")
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    location = parse_url(str(path))
    assert location is not None, "ome-zarr-py takes it for no Zarr"
    (node, *_) = list(Reader(location)())
    return [np.asarray(level) for level in node.data], node.metadata


@pytest.fixture
def ingested(tmp_path):
    Image.fromarray(photograph(203, 130, 3)).save(tmp_path / "photo.png")
    Image.fromarray(photograph(60, 64)).save(tmp_path / "grey.png")
    url = tmp_path / "out.zarr"
    arguments = ["ingest", tmp_path / "photo.png", tmp_path / "grey.png", url, "--ome", "--chunk", 64]
    assert main([str(one) for one in arguments]) == 0
    return url


def test_what_ingest_writes(ingested):
    group = zarr.open_group(ingested / "photo", mode="r", zarr_format=3)
    levels = [group[str(number)] for number in range(3)]
    assert "3" not in group and [level.shape for level in levels] == [(3, 203, 130), (3, 102, 65), (3, 51, 33)]
    assert all(type(level.metadata.codecs[0]).__name__ == "DeepSICCodec" for level in levels)
    assert all(level.metadata.dimension_names == ("c", "y", "x") for level in levels)
    np.testing.assert_array_equal(levels[0][...], photograph(203, 130, 3).transpose(2, 0, 1))
    exact = photograph(203, 130, 3)[:202].astype(float).reshape(101, 2, 65, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(levels[1][:, :101] - exact).max() <= 0.5
    assert open_labels(ingested, "photo/0").where("Bright | Dim | Dark").count == 6  # the others are mostly padding
    assert "1_labels" not in group
    grey = zarr.open_group(ingested / "grey", mode="r")
    assert "1" not in grey and grey["0"].shape == (60, 64)
    assert "omero" in group.attrs["ome"] and "omero" not in grey.attrs["ome"]


def test_ome_zarr_reads_what_ingest_writes(ingested):
    levels, metadata = read(ingested / "photo")
    assert [axis["name"] for axis in metadata["axes"]] == ["c", "y", "x"]
    assert [level.shape for level in levels] == [(3, 203, 130), (3, 102, 65), (3, 51, 33)]
    np.testing.assert_array_equal(levels[0], photograph(203, 130, 3).transpose(2, 0, 1))


def test_metadata_is_valid(ingested):
    models = pytest.importorskip("ome_zarr_models.v05")
    image = models.Image.from_zarr(zarr.open_group(ingested / "photo", mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    assert [dataset.path for dataset in multiscale.datasets] == ["0", "1", "2"]
    scale, translation = multiscale.datasets[1].coordinateTransformations
    assert scale.scale == [1, 2, 2] and translation.translation == [0, 0.5, 0.5]


def test_ome_zarr_reads_format_2(tmp_path):
    """OME-NGFF 0.4: written by hand, as its separator of chunk keys is not Zarr's usual one."""
    image = photograph(3, 96, 80)
    for number, pixels in enumerate([image, image[:, ::2, ::2]]):
        z = create_array(
            tmp_path / "old.zarr",
            name=str(number),
            shape=pixels.shape,
            dtype="u1",
            chunks=(3, 32, 32),
            codec=DeepSIC(axes="cyx"),
            zarr_format=2,
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )
        z[...] = pixels
    group = zarr.open_group(tmp_path / "old.zarr", mode="a", zarr_format=2)
    multiscales = describe("image", [image, image[:, ::2, ::2]], "cyx")["ome"]["multiscales"]
    group.attrs["multiscales"] = [{"version": "0.4", **multiscales[0]}]
    levels, _ = read(tmp_path / "old.zarr")
    np.testing.assert_array_equal(levels[0], image)
    np.testing.assert_array_equal(levels[1], image[:, ::2, ::2])


def test_resume_and_refusals(ingested, tmp_path, capsys):
    chunks = {path: path.stat().st_mtime_ns for path in (ingested / "photo" / "0" / "c").rglob("*") if path.is_file()}
    arguments = ["ingest", tmp_path / "photo.png", ingested, "--chunk", 64]
    assert main([str(one) for one in [*arguments, "--ome", "--resume"]]) == 0
    assert chunks == {path: path.stat().st_mtime_ns for path in chunks}
    capsys.readouterr()
    assert main([str(one) for one in [*arguments, "--ome", "--format", 2]]) == 2
    assert "Zarr format 3" in capsys.readouterr().err
    assert main([str(one) for one in [*arguments, "--name", "plain"]]) == 0
    assert main([str(one) for one in [*arguments, "--name", "plain", "--ome"]]) == 1
    assert "'plain' cannot be a group" in capsys.readouterr().err


def test_a_pyramid_is_named_like_its_image(ingested, tmp_path, capsys):
    """Of a pyramid, commands and functions take the full resolution; another level has a name of its own."""
    assert open_labels(ingested, "photo").array.path == "photo/0"
    assert open_labels(ingested / "photo").array.path == "0"
    assert open_archive(ingested, "photo").shape == (3, 203, 130)
    assert open_archive(ingested, "photo/1").shape == (3, 102, 65)
    assert main(["query", str(ingested), "Bright | Dim | Dark", "--name", "photo"]) == 0
    assert "6 of 12 chunks" in capsys.readouterr().out
    with pytest.raises(UnsupportedArray, match="found grey/0, photo/0; pass name="):
        open_archive(ingested)
    with pytest.raises(UnsupportedArray, match="no array 'phot'; it has grey/0, photo/0, photo/1, photo/2"):
        open_archive(ingested, "phot")
    assert [*consolidate_labels(ingested)] == ["grey/0", "photo/0"] and "1_labels" not in open_node(ingested, "photo")


@pytest.mark.parametrize("multiscales", [7, [], [{"datasets": [{}]}], [{"datasets": [{"path": "9"}, {"path": "0"}]}]])
def test_a_damaged_pyramid_hides_no_array(multiscales, tmp_path):
    zarr.open_group(tmp_path, mode="w", attributes={"ome": {"multiscales": multiscales}})
    create_array(tmp_path, name="0", data=photograph(64, 64))
    assert open_archive(tmp_path).path == "0"


def test_axes():
    (level,) = pyramid(source((40, 30, 3, 2), "yxct"))
    assert level.axes == "tcyx" and level.values.shape == (2, 3, 40, 30)
    check_rejects(UnsupportedArray, "no axis n", pyramid, source((2, 40, 30), "nyx"))
    assert [one.values.shape for one in pyramid(source((7, 3), "yx"), 1)] == [(7, 3), (4, 2), (2, 1), (1, 1)]


def test_pixels_without_data_have_no_say():
    values = np.array([[9, 0, 0, 0], [0, 0, 0, 0], [10, 20, 7, 7], [20, 31, 7, 8]], "u2")
    image = ImageSource("image", da.from_array(values), "yx")
    np.testing.assert_array_equal(pyramid(image, 2, nodata=0)[1].values, [[9, 0], [20, 7]])
    floats = np.where(values == 0, np.nan, values).astype("f4")
    image = ImageSource("image", da.from_array(floats), "yx")
    for nodata in (None, "NaN"):
        np.testing.assert_allclose(pyramid(image, 2, nodata)[1].values, [[9, np.nan], [20.25, 7.25]])


def test_georeference_follows_the_level():
    first, second = pyramid(source((40, 30), "yx", transform=[10, 0, 500, 0, -10, 900]), 20)
    assert first.attributes["transform"] == [10, 0, 500, 0, -10, 900]
    assert second.attributes["transform"] == [20, 0, 500, 0, -20, 900]
