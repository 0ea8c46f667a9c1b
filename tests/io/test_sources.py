"""Folders of strangers: names that mean something else in an archive, links, files that name other files."""

import os
import warnings

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import strangers
from deepsic_codec.cli.main import main
from deepsic_codec.errors import SourceError
from deepsic_codec.io.images import open_image, read_rgb
from deepsic_codec.io.sources import ArrayNames, open_sources
from tests.common import check_rejects, photograph

pytest.importorskip("dask.array")


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(strangers.PARTS) | st.text(max_size=5), min_size=1, max_size=3),
            st.sampled_from(["png", "bmp", ""]),
        )
    )
)
@settings(deadline=None)
def test_every_source_has_a_name_of_its_own(sources):
    assert strangers.run_names([("/".join(parts), suffix) for parts, suffix in sources]) == "named"


def test_names_that_are_free_stay_as_they_are():
    names = ArrayNames()
    assert [names.choose(name, "png") for name in ("a", "b/c", "b/c.d", "ä 1")] == ["a", "b/c", "b/c.d", "ä 1"]
    assert [names.choose(name, "png") for name in ("b", "a/1", "a", "b/c")] == ["b-png", "a-1", "a-png", "b/c-png"]
    assert [names.choose(name, "png") for name in ("a_labels", "zarr.json", "..")] == [
        "a_labels-png",
        "zarr.json-png",
        "png",
    ]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_images_of_odd_names_are_all_stored(stub, tmp_path, capsys, zarr_format):
    folder = tmp_path / "images"
    (folder / "photo").mkdir(parents=True)
    names = [
        "zarr.json.png",
        ".zgroup.png",
        "photo.png",
        "photo/1.png",
        "image.png",
        "image_labels.png",
        "..png",
        "\x1b[2J.png",
    ]
    for number, name in enumerate(names):
        Image.fromarray(photograph(20, 30, 3, seed=number)).save(folder / name, format="png")
    assert (
        main(["ingest", str(folder), str(tmp_path / "a.zarr"), "--max-error", "0", "--format", str(zarr_format)]) == 0
    )
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    arrays = {
        array.attrs.get("source"): array for _, array in group.members(max_depth=None) if isinstance(array, zarr.Array)
    }
    for number, name in enumerate(names):
        np.testing.assert_array_equal(arrays[os.path.basename(name)][:], photograph(20, 30, 3, seed=number))
    out = capsys.readouterr().out
    assert out.count("renamed: ") == 5 and "photo.png: is array 'photo-png'" in out
    assert "\x1b" not in out


@pytest.fixture
def linked(tmp_path):
    """A folder with images, a link to one of them, and links to a file and a folder outside."""
    (tmp_path / "private").mkdir()
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for path in ("private/secret.png", "images/a.png", "images/sub/b.png"):
        Image.fromarray(photograph(20, 30, 3)).save(tmp_path / path)
    os.symlink("sub/b.png", tmp_path / "images" / "inside.png")
    os.symlink("..", tmp_path / "images" / "sub" / "back")
    os.symlink(tmp_path / "private" / "secret.png", tmp_path / "images" / "file.png")
    os.symlink(tmp_path / "private", tmp_path / "images" / "folder")
    return tmp_path / "images"


def test_links_that_lead_out_of_a_folder_are_named_and_left_out(stub, linked, tmp_path, capsys):
    left = []
    names = [source.name for source in open_sources([linked], left_out=left.append)]
    assert names == ["a", "inside", "sub/b"]
    assert len(left) == 2 and "file.png" in left[0] and "folder" in left[1] and "--follow-links" in left[0]
    with pytest.warns(UserWarning, match="leads out of the folder"):
        list(open_sources([linked]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        followed = [source.name for source in open_sources([linked], follow_links=True)]
    assert followed == ["a", "file", "folder/secret", "inside", "sub/b"]
    assert main(["ingest", str(linked), str(tmp_path / "a.zarr")]) == 3
    assert capsys.readouterr().out.count("skipped: ") == 2
    assert main(["ingest", str(linked), str(tmp_path / "b.zarr"), "--follow-links"]) == 0
    assert "skipped" not in capsys.readouterr().out


def test_what_a_mac_stores_beside_images_is_no_image(stub, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "._b.png"):
        Image.fromarray(photograph(20, 30, 3)).save(folder / name)
    (folder / "._a.png").write_bytes(b"\0\5\x16\7" + bytes(100))
    assert main(["ingest", str(folder), str(tmp_path / "a.zarr")]) == 0
    assert {*zarr.open_group(tmp_path / "a.zarr", mode="r").array_keys()} == {"a", "._b"}


def test_parts_of_a_file_that_are_left_out_are_named(stub, tmp_path, capsys):
    photo = Image.fromarray(photograph(40, 60, 3))
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.fromarray(photograph(40, 60, 3, seed=2))])
    assert main(["ingest", str(tmp_path / "a.jpg"), str(tmp_path / "a.zarr")]) == 3
    assert "a.jpg: image 2 of 2 (60 x 40 pixels) is not stored" in capsys.readouterr().out
    photo.save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=[photo.resize((30, 20))])
    assert main(["ingest", str(tmp_path / "b.jpg"), str(tmp_path / "a.zarr")]) == 0


def test_a_folder_of_nothing_but_links(tmp_path):
    (tmp_path / "images").mkdir()
    os.symlink(tmp_path / "secret.png", tmp_path / "images" / "photo.png")
    check_rejects(
        SourceError, "photo.png|lead out of it", lambda: list(open_sources([tmp_path / "images"], left_out=list))
    )


VRT = """<VRTDataset rasterXSize="20" rasterYSize="20"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename>{}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"""


@pytest.mark.parametrize("name", ["a.tif", "a.jp2", "a.png", "a.pgm", "a.jpg", "a.jxl"])
def test_a_description_of_other_files_is_no_image(tmp_path, name):
    rasterio = pytest.importorskip("rasterio")
    Image.fromarray(photograph(20, 20)).save(tmp_path / "secret.tif")
    (tmp_path / name).write_text(VRT.format(tmp_path / "secret.tif"))
    with rasterio.open(tmp_path / name) as file:  # GDAL reads it under any name
        assert file.driver == "VRT"
    check_rejects(SourceError, "cannot be read", open_image, tmp_path / name)
    check_rejects(SourceError, "cannot be read", read_rgb, tmp_path / name)


def test_pillow_starts_no_programs(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", refuse)
    (tmp_path / "a.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    )
    check_rejects(SourceError, "cannot be read", open_image, tmp_path / "a.png")
    check_rejects(SourceError, "cannot be read", read_rgb, tmp_path / "a.png")


def test_an_ome_tiff_names_no_other_file(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    secret = photograph(20, 30, seed=1)
    tifffile.imwrite(tmp_path / "secret.ome.tif", secret, compression="zlib", metadata={"axes": "YX"})
    other = tifffile.TiffFile(tmp_path / "secret.ome.tif").ome_metadata
    uuid = other.partition('UUID="')[2].partition('"')[0]
    text = other.replace('PlaneCount="1"', "").replace("</TiffData>", "").partition("<TiffData")
    entry = f'<TiffData IFD="0" PlaneCount="1"><UUID FileName="secret.ome.tif">{uuid}</UUID></TiffData>'
    end = "</Pixels></Image></OME>"
    description = text[0].replace(uuid, "urn:uuid:00000000-0000-0000-0000-000000000000") + entry + end
    (tmp_path / "images").mkdir()
    own = photograph(20, 30, seed=2)
    path = tmp_path / "images" / "a.ome.tif"
    tifffile.imwrite(path, own, compression="zlib", description=description.encode(), metadata=None)
    os.link(tmp_path / "secret.ome.tif", tmp_path / "images" / "secret.ome.tif")
    assert np.array_equal(tifffile.imread(path), secret), "the description does not lead to the other file"
    np.testing.assert_array_equal(open_image(path).values.compute(), own)
