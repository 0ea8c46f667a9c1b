"""GeoTIFF to archive to GeoTIFF: what GDAL reads of both, whole and in part; stacks; groups of scenes."""

import numpy as np
import pytest
import zarr

from deepsic_codec.cli import main as cli
from tests.common import photograph

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("dask.array")
pytestmark = [
    pytest.mark.usefixtures("stub"),
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
]


def run(*args):
    assert cli.main([*map(str, args)]) == 0


def write(path, values, **about):
    """Write bands (H, W, bands) and what `about` says: arguments of rasterio.open, attributes of the file, tags."""
    height, width, bands = values.shape
    keys = ("crs", "transform", "nodata")
    profile = {key: about.pop(key) for key in keys if key in about}
    profile |= {"height": height, "width": width, "count": bands, "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", **profile) as file:
        file.write(np.moveaxis(values, -1, 0))
        tags, band_tags = about.pop("tags", {}), about.pop("band_tags", {})
        for key, value in about.items():
            setattr(file, key, value)
        file.update_tags(**tags)
        for band, items in band_tags.items():
            file.update_tags(band, **items)


def told(path):
    """What GDAL reads of a file."""
    with rasterio.open(path) as file:
        points, crs = file.gcps
        points = [(point.row, point.col, point.x, point.y, point.z, point.id) for point in points]
        rpcs = None if file.rpcs is None else file.rpcs.to_dict()
        ours = ("TIFFTAG_XRESOLUTION", "TIFFTAG_YRESOLUTION", "TIFFTAG_RESOLUTIONUNIT")
        tags = {key: value for key, value in file.tags().items() if key not in ours}
        names = ("crs", "transform", "nodata", "scales", "offsets", "units", "descriptions", "colorinterp")
        bands = [file.tags(band) for band in file.indexes]
        return {name: getattr(file, name) for name in names} | {
            "gcps": points,
            "gcps_crs": crs,
            "rpcs": rpcs,
            "tags": tags,
            "band_tags": bands,
        }


def points(rows, columns):
    from rasterio.control import GroundControlPoint as Point

    return [Point(row, col, 10 + col / 128, 50 - row / 128, 3.5, id=f"{row}") for row in rows for col in columns]


def rpcs():
    from rasterio.rpc import RPC

    whole = {key: [1.0] * 20 for key in ("line_num_coeff", "line_den_coeff", "samp_num_coeff", "samp_den_coeff")}
    names = ("height_off", "height_scale", "lat_off", "lat_scale", "line_off", "line_scale")
    names += ("long_off", "long_scale", "samp_off", "samp_scale")
    return RPC(**whole, **{name: float(number + 1) for number, name in enumerate(names)}, err_bias=None, err_rand=None)


PLACE = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
KINDS = {
    "place": PLACE,
    "turned": {"transform": rasterio.Affine(2, 3, 500, 5, -7, 900), "crs": "EPSG:32632"},
    "no code": {**PLACE, "crs": "+proj=laea +lat_0=52 +lon_0=10 +x_0=1 +y_0=2 +ellps=bessel +units=m"},
    "scale": {"scales": (0.0001,) * 3, "offsets": (-0.1,) * 3},
    "scale of bands": {**PLACE, "scales": (0.5, 0.25, 2.0), "offsets": (0.0, 1.0, -3.5), "nodata": 0},
    "bands": {"descriptions": ("B02", None, "B04"), "units": ("W", "W", "K")},
    "points": {"gcps": (points((0, 60), (0, 80)), rasterio.CRS.from_epsg(4326))},
    "polynomial": {"rpcs": rpcs()},
    "tags": {
        **PLACE,
        "tags": {"ACQUIRED": "2020-02-03", "AREA_OR_POINT": "Point"},
        "band_tags": {2: {"wavelength": "560"}},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_geotiff_comes_back_with_place_and_meaning(tmp_path, kind):
    write(tmp_path / "a.tif", photograph(60, 80, 3).astype("u2"), **KINDS[kind])
    run("ingest", tmp_path / "a.tif", tmp_path / "a.zarr", "--max-error", 0, "--chunk", 32)
    run("export", tmp_path / "a.zarr", tmp_path / "b.tif")
    before, after = told(tmp_path / "a.tif"), told(tmp_path / "b.tif")
    if kind not in ("place", "turned", "no code", "scale of bands", "tags"):
        before["tags"], after["tags"] = {}, {}  # GDAL says what a pixel is only of images with a place
    assert before | {"colorinterp": None} == after | {"colorinterp": None}


def test_a_part_has_the_place_and_bands_of_the_part(tmp_path):
    about = {**KINDS["scale of bands"], "descriptions": ("a", "b", "c")}
    write(tmp_path / "a.tif", photograph(60, 80, 3).astype("u2"), **about)
    write(tmp_path / "p.tif", photograph(60, 80, 3), **KINDS["points"])
    run("ingest", tmp_path / "a.tif", tmp_path / "p.tif", tmp_path / "a.zarr", "--chunk", 32)
    region = ("--region", "y=20:50", "x=10:70")
    run(
        "export", tmp_path / "a.zarr", tmp_path / "b.tif", "--name", "a/a", "--region", "y=20:50", "x=10:70", "band=1:3"
    )
    part = told(tmp_path / "b.tif")
    assert part["transform"] == rasterio.Affine(10, 0, 500100, 0, -10, 4999800)
    assert (part["scales"], part["offsets"], part["descriptions"]) == ((0.25, 2.0), (1.0, -3.5), ("b", "c"))
    run("export", tmp_path / "a.zarr", tmp_path / "q.tif", "--name", "p/p", *region)
    assert [point[:4] for point in told(tmp_path / "q.tif")["gcps"]][0] == (-20.0, -10.0, 10.0, 50.0)


def test_chunks_that_a_query_exports_have_their_place(tmp_path):
    write(tmp_path / "a.tif", photograph(60, 80, 3), **PLACE)
    run("ingest", tmp_path / "a.tif", tmp_path / "a.zarr", "--chunk", 32)
    run("query", tmp_path / "a.zarr", "Bright >= 0", "--export", tmp_path / "out", "--as", "tiff")
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 6
    places = {path.stem: told(path) for path in files}
    assert places["a_1_2_0"]["transform"] == rasterio.Affine(10, 0, 500640, 0, -10, 4999680)
    assert {str(place["crs"]) for place in places.values()} == {"EPSG:32632"}


def test_images_of_different_places_are_groups_of_their_own(tmp_path):
    moved = {**PLACE, "transform": rasterio.Affine(10, 0, 6e5, 0, -10, 5e6)}
    for name, about in {"a": PLACE, "b": moved, "c": PLACE}.items():
        write(tmp_path / f"{name}.tif", photograph(60, 80, 3), **about)
    run("ingest", tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "two.zarr")
    two = zarr.open_group(tmp_path / "two.zarr", mode="r")
    assert two["a/x"][0] == 500005 and two["b/x"][0] == 600005
    assert two["b/b"].attrs["grid_mapping"] == "spatial_ref" and "crs_wkt" in two["b/spatial_ref"].attrs
    run("ingest", tmp_path / "a.tif", tmp_path / "c.tif", tmp_path / "one.zarr")
    one = zarr.open_group(tmp_path / "one.zarr", mode="r")
    assert {"a", "c", "x", "y", "band", "spatial_ref"} <= set(one.array_keys())
    with pytest.warns(UserWarning, match="group of its own"):
        run("ingest", tmp_path / "b.tif", tmp_path / "one.zarr")
    assert one["x"][0] == 500005 and "grid_mapping" not in one["b"].attrs and one["b"].attrs["transform"][2] == 600000
    run("ingest", tmp_path / "b.tif", tmp_path / "one.zarr", "--name", "d/b")
    assert one["d/x"][0] == 600005


@pytest.mark.parametrize("source_format", [2, 3])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_copy_is_opened_by_xarray_with_all_that_is_known(tmp_path, zarr_format, source_format):
    xarray = pytest.importorskip("xarray")
    image = photograph(60, 80, 3)
    about = {"scales": (0.5,) * 3, "offsets": (2.0,) * 3, "descriptions": ("r", "g", "b"), "units": ("m",) * 3}
    write(tmp_path / "a.tif", image, nodata=7, **PLACE, **about)
    run("ingest", tmp_path / "a.tif", tmp_path / "a.zarr", "--format", source_format, "--max-error", 0)
    zarr.open_group(tmp_path / "copy.zarr", mode="w", zarr_format=zarr_format)
    options = ("--region", "y=20:50", "x=10:70", "band=0:2", "--format", zarr_format)
    run("export", tmp_path / "a.zarr", tmp_path / "copy.zarr" / "a", *options)  # into a group
    run("export", tmp_path / "a.zarr", tmp_path / "alone.zarr", *options)  # a group of its own
    run("export", tmp_path / "a.zarr", tmp_path / "alone.zarr", *options, "--overwrite")
    expected = np.where(image == 7, np.nan, image * 0.5 + 2)[20:50, 10:70, :2]
    for name in ("copy.zarr", "alone.zarr"):
        opened = xarray.open_zarr(tmp_path / name, consolidated=zarr_format == 2 and name == "alone.zarr")
        array = opened["a"]
        np.testing.assert_array_equal(array.transpose("y", "x", "band"), expected)
        assert opened["x"][0] == 500105 and opened["y"][0] == 4999795 and opened["band"].values.tolist() == [1, 2]
        assert opened["spatial_ref"].attrs["GeoTransform"].startswith("500100.0 ")
        assert array.attrs["proj:code"] == "EPSG:32632" and array.attrs["long_name"] == ["r", "g"]
        assert array.attrs["spatial:transform"] == [10, 0, 500100, 0, -10, 4999800]


@pytest.mark.parametrize(
    "names,expected",
    [
        (
            ("S2A_MSIL2A_20200131T101021_N0213_R022_T32UQD_20200131T121212", "S2B_MSIL2A_20200205T101109_X_20200206T1"),
            ["2020-01-31T10:10:21", "2020-02-05T10:11:09"],
        ),
        (
            ("T32UQD_20200131T101021_B04", "LC08_L1TP_020039_20200201_20200301_01_T1"),
            ["2020-01-31T10:10:21", "2020-02-01"],
        ),
        (("a 2020-01-31", "b_2020_02_28"), ["2020-01-31", "2020-02-28"]),
        (("a_20200131", "b_20200131"), None),  # the same
        (("a_20200131_20200201", "b_20200301_20200302"), None),  # which of them?
        (("a_20200131", "b"), None),
        (("a_20200131", "b_20200231"), None),
        (("scan_1202001311", "scan_1202002011"), None),  # no dates
    ],
)
def test_a_stack_has_times_that_its_names_say(tmp_path, names, expected):
    xarray = pytest.importorskip("xarray")
    for name in names:
        write(tmp_path / f"{name}.tif", photograph(20, 30, 1), **PLACE)
    paths = [tmp_path / f"{name}.tif" for name in names]
    run("ingest", *paths, tmp_path / "s.zarr", "--stack", "days", "--semantics", "none")
    opened = xarray.open_zarr(tmp_path / "s.zarr", consolidated=False)
    assert opened["days"].dims[0] == ("n" if expected is None else "time")
    if expected is not None:
        np.testing.assert_array_equal(opened["time"].values, np.array(expected, "M8[ns]"))
        run("export", tmp_path / "s.zarr", tmp_path / "copy.zarr", "--region", "time=1:2")
        copy = xarray.open_zarr(tmp_path / "copy.zarr", consolidated=False)
        np.testing.assert_array_equal(copy["time"].values, np.array(expected[1:], "M8[ns]"))


def test_a_stack_has_times_that_its_tags_say(tmp_path):
    for day in (3, 4):
        write(tmp_path / f"{day}.tif", photograph(20, 30, 1), tags={"DATE_ACQUIRED": f"2020-01-0{day}"}, **PLACE)
    run("ingest", tmp_path / "3.tif", tmp_path / "4.tif", tmp_path / "s.zarr", "--stack", "days", "--semantics", "none")
    assert zarr.open_array(tmp_path / "s.zarr/time", mode="r")[...].tolist() == [1578009600, 1578096000]


def test_a_stack_keeps_what_its_images_share_and_lists_the_rest(tmp_path):
    for day in range(3):
        about = {**PLACE, "scales": (0.5,), "tags": {"DAY": str(day)}}
        write(tmp_path / f"d{day}.tif", photograph(60, 80, 1, seed=day).astype("i2"), nodata=-9999, **about)
    run("ingest", *sorted(tmp_path.glob("*.tif")), tmp_path / "s.zarr", "--stack", "days", "--max-error", 0)
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    attributes = group["days"].attrs
    assert attributes["crs"] == "EPSG:32632" and attributes["scale_factor"] == 0.5 and group["x"][0] == 500005
    assert attributes["images"] == [{"tags": {"DAY": str(day)}} for day in range(3)]
    assert group["days"].metadata.codecs[0].nodata == -9999 and attributes["sources"][2] == "d2.tif"
    write(tmp_path / "d3.tif", photograph(60, 80, 1).astype("i2"), nodata=0)
    assert (
        cli.main(["ingest", *map(str, sorted(tmp_path.glob("*.tif"))), str(tmp_path / "t.zarr"), "--stack", "t"]) != 0
    )
    assert not (tmp_path / "t.zarr").exists()
