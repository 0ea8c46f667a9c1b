"""Which pixels hold data survives the way in: alpha channels, masks and NoData values of image files."""

import numpy as np
import pytest
import zarr
from PIL import Image
from rasterio.enums import ColorInterp

from deepsic_codec.cli.main import main
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.io import images
from deepsic_codec.io.images import open_image
from deepsic_codec.io.ingest import declared_nodata
from tests.common import check_rejects, photograph

pytest.importorskip("dask.array")
rasterio = pytest.importorskip("rasterio")
tifffile = pytest.importorskip("tifffile")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

SHAPE = 70, 90


def pixels(dtype="u1", bands=3, lowest=1):
    """Samples of which none is below `lowest`, and where they hold data."""
    values = photograph(*SHAPE, bands).clip(lowest).astype(dtype)
    valid = np.ones(SHAPE, bool)
    valid[:20, 30:] = False
    return values, valid


def all_values(dtype="u1"):
    """Samples that use all values of a dtype, and where they hold data; what lies below the mask differs, too."""
    info = np.iinfo(dtype)
    values = np.random.default_rng(0).integers(info.min, info.max + 1, (*SHAPE, 3)).astype(dtype)
    valid = np.ones(SHAPE, bool)
    valid[:5, 30:] = False
    values[5:].flat[: 1 << 8] = np.linspace(info.min, info.max, 1 << 8)
    return values, valid


def write_mask(path, values, valid, inside=True, **profile):
    height, width, count = values.shape
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside),
        rasterio.open(
            path, "w", driver="GTiff", height=height, width=width, count=count, dtype=values.dtype, **profile
        ) as file,
    ):
        file.write(np.moveaxis(values, -1, 0))
        file.write_mask(valid)


def write_alpha(path, values, valid, **profile):
    alpha = np.where(valid, np.iinfo(values.dtype).max, 0).astype(values.dtype)
    bands = np.moveaxis(np.dstack([values, alpha]), -1, 0)
    with rasterio.open(
        path, "w", driver="GTiff", height=SHAPE[0], width=SHAPE[1], count=len(bands), dtype=values.dtype, **profile
    ) as file:
        file.colorinterp = [*[ColorInterp.undefined] * (len(bands) - 1), ColorInterp.alpha]
        file.write(bands)


def write_extra_sample(path, values, valid, **options):
    alpha = np.where(valid, np.iinfo(values.dtype).max, 0).astype(values.dtype)
    whole = np.dstack([values, alpha])
    colors = 3 if values.shape[2] >= 3 else 1
    extra = [0] * (values.shape[2] - colors) + [2]
    photometric = "rgb" if colors == 3 else "minisblack"
    if options.get("planarconfig") == "separate":
        whole = np.moveaxis(whole, -1, 0)
    options = {"planarconfig": "contig", **options}
    tifffile.imwrite(path, whole, photometric=photometric, extrasamples=extra, **options)


WAYS = {
    "mask inside": lambda path, *data: write_mask(path, *data),
    "mask inside, tiled": lambda path, *data: write_mask(path, *data, tiled=True, blockxsize=16, blockysize=16),
    "mask beside": lambda path, *data: write_mask(path, *data, inside=False),
    "alpha of GDAL": write_alpha,
    "alpha of GDAL, planar": lambda path, *data: write_alpha(path, *data, interleave="band"),
    "extra sample": write_extra_sample,
    "extra sample, planar": lambda path, *data: write_extra_sample(path, *data, planarconfig="separate"),
    "extra sample, BigTIFF": lambda path, *data: write_extra_sample(path, *data, byteorder=">", bigtiff=True),
}


def check_valid(source, values, valid):
    """Missing pixels have the NoData value, no other sample has it, and all others are as they were."""
    assert source.values.shape == values.shape and source.values.dtype == values.dtype
    nodata = declared_nodata(source)
    samples = source.values.compute()
    missing = np.isnan(samples) if nodata == "NaN" else samples == nodata
    np.testing.assert_array_equal(missing, np.broadcast_to(~valid[..., None], values.shape))
    difference = np.abs(samples[valid].astype("f8") - values[valid])
    assert difference.max() <= source.shifted
    np.testing.assert_array_equal(source.values[:30, 20:40, 1].compute(), samples[:30, 20:40, 1])


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4"])
@pytest.mark.parametrize("way", WAYS)
def test_masks_and_alpha_become_nodata(tmp_path, monkeypatch, way, dtype):
    if dtype == "f4" and "mask" not in way or dtype == "i2" and "sample" in way:
        pytest.skip("no such files")
    monkeypatch.setattr(images, "BLOCK_EDGE", 32)
    values, valid = pixels(dtype)
    WAYS[way](tmp_path / "a.tif", values, valid)
    source = open_image(tmp_path / "a.tif")
    assert not source.shifted
    check_valid(source, values, valid)
    assert declared_nodata(source) == ("NaN" if dtype == "f4" else 0)
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif", drop_alpha=True).values, values)


@pytest.mark.parametrize("way", WAYS)
def test_alpha_after_any_number_of_bands(tmp_path, way):
    for bands in (2, 4, 6):
        values, valid = pixels(bands=bands)
        WAYS[way](tmp_path / "a.tif", values, valid)
        check_valid(open_image(tmp_path / "a.tif"), values, valid)


def test_a_value_is_chosen_that_no_sample_has(tmp_path):
    values, valid = pixels(lowest=0)
    values[60, 60] = 0
    values = np.where(values == 255, 254, values)
    write_mask(tmp_path / "a.tif", values, valid)
    source = open_image(tmp_path / "a.tif")
    check_valid(source, values, valid)
    assert declared_nodata(source) == 255 and not source.shifted
    values[~valid] = 9
    values = np.where((values == 9) & valid[..., None], 8, values)
    write_mask(tmp_path / "b.tif", values, valid)
    source = open_image(tmp_path / "b.tif")
    check_valid(source, values, valid)
    assert declared_nodata(source) == 9, "what all missing pixels have"


def test_where_all_values_are_in_use_data_move_by_one_step_and_lossless_is_refused(tmp_path, capsys):
    values, valid = all_values()
    write_mask(tmp_path / "a.tif", values, valid)
    source = open_image(tmp_path / "a.tif")
    assert source.shifted and declared_nodata(source) == 0
    check_valid(source, values, valid)
    assert main(["ingest", str(tmp_path / "a.tif"), str(tmp_path / "a.zarr"), "--max-error", "0"]) == 2
    assert "--drop-alpha" in capsys.readouterr().err and not (tmp_path / "a.zarr").exists()


def test_opaque_alpha_says_nothing(tmp_path):
    rgb = photograph(*SHAPE, 3)
    Image.fromarray(np.dstack([rgb, np.full(SHAPE, 255, "u1")])).save(tmp_path / "a.png")
    source = open_image(tmp_path / "a.png")
    np.testing.assert_array_equal(source.values, rgb)
    assert "nodata" not in source.attributes


@pytest.mark.parametrize("kind", ["RGBA", "LA", "RGB key", "L key", "16 bits", "16 bits, key", "webp"])
def test_transparency_of_other_files(tmp_path, kind):
    imagecodecs = pytest.importorskip("imagecodecs")
    values, valid = pixels(bands=1 if kind[0] == "L" or "key" in kind and "16" in kind else 3)
    alpha = np.where(valid, 255, 0).astype("u1")
    path = tmp_path / "a.png"
    if "key" in kind:
        values = np.where(values == 7, 8, values)
        values[~valid] = 7
    if kind == "16 bits, key":
        values = values.astype("u2") * 9
        Image.fromarray(values[..., 0]).save(path, transparency=63)
    elif "key" in kind:
        Image.fromarray(np.squeeze(values)).save(path, transparency=(7, 7, 7) if values.shape[2] == 3 else 7)
    elif kind == "16 bits":
        values = values.astype("u2") * 9
        path.write_bytes(imagecodecs.png_encode(np.dstack([values, alpha.astype("u2") * 257])))
    elif kind == "webp":
        path = tmp_path / "a.webp"
        Image.fromarray(np.dstack([values, alpha])).save(path, lossless=True, exact=True)
    else:
        Image.fromarray(np.dstack([values, alpha])).save(path)
    source = open_image(path)
    samples = source.values.compute().reshape(values.shape)
    nodata = declared_nodata(source)
    assert nodata == (63 if "16 bits, key" in kind else 7 if "key" in kind else 0)
    np.testing.assert_array_equal(samples == nodata, np.broadcast_to(~valid[..., None], values.shape))
    np.testing.assert_array_equal(samples[valid], values[valid])


def test_a_band_that_is_only_called_alpha_is_data(tmp_path):
    """Red, green, blue and near infrared as many programs write them."""
    values = photograph(*SHAPE, 4)
    options = {"driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "count": 4, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.tif", "w", **options, photometric="RGB", crs="EPSG:32632") as file:
        file.write(np.moveaxis(values, -1, 0))
    tifffile.imwrite(tmp_path / "b.tif", values, photometric="rgb", extrasamples=[2])
    for name in ("a.tif", "b.tif"):
        np.testing.assert_array_equal(open_image(tmp_path / name).values, values)


def test_a_mask_that_hides_everything_is_refused(tmp_path):
    values, valid = pixels()
    write_mask(tmp_path / "a.tif", values, valid & False)
    check_rejects(UnsupportedArray, "--drop-alpha", open_image, tmp_path / "a.tif")
    write_mask(tmp_path / "b.tif", values * 0, valid & False)
    assert declared_nodata(open_image(tmp_path / "b.tif")) == 0


@pytest.mark.parametrize("text", ["-9999", " -9999 ", "-9999.0", "-9.999e3", "nan", "NaN", "inf", "-inf"])
@pytest.mark.parametrize("pages", [1, 2])
def test_nodata_of_a_geotiff_however_it_is_written(tmp_path, text, pages):
    values = photograph(pages, *SHAPE).astype("f4") / 3
    values[:, :20, 30:] = float(text)
    tifffile.imwrite(tmp_path / "a.tif", values[0] if pages == 1 else values, extratags=[(42113, "s", 0, text, True)])
    source = open_image(tmp_path / "a.tif")
    nodata = declared_nodata(source)
    assert nodata == (-9999 if "9" in text else "NaN")
    samples = source.values.compute().reshape(values.shape)
    missing = samples == -9999 if "9" in text else np.isnan(samples)
    np.testing.assert_array_equal(missing[:, :20, 30:], True)
    assert missing.sum() == pages * 20 * 60


def test_the_archive_has_the_mask(tmp_path):
    values, valid = pixels()
    write_mask(tmp_path / "a.tif", values, valid)
    assert main(["ingest", str(tmp_path / "a.tif"), str(tmp_path / "a.zarr"), "--quality", "60"]) == 0
    array = zarr.open_array(tmp_path / "a.zarr", path="a", mode="r")
    assert array.metadata.codecs[0].nodata == array.attrs["nodata"] == 0
    np.testing.assert_array_equal((array[...] == 0).all(axis=-1), ~valid)


@pytest.mark.parametrize(
    "options", [[], ["--quality", "30"], ["--bpp", "0.1"], ["--max-error", "20"], ["--ome"]], ids=str
)
def test_classes_stay_classes_at_any_setting(tmp_path, options):
    """Also in the levels of a pyramid."""
    classes = np.random.default_rng(0).choice([10, 20, 95], (600, 700)).astype("u1")
    image = Image.fromarray(classes, "P")
    image.putpalette(bytes(range(256)) * 3)
    image.save(tmp_path / "a.png")
    assert main(["ingest", str(tmp_path / "a.png"), str(tmp_path / "a.zarr"), *options]) == 0
    array = zarr.open_array(tmp_path / "a.zarr", path="a/0" if options == ["--ome"] else "a", mode="r")
    np.testing.assert_array_equal(array[...], classes)
    if options == ["--ome"]:
        level = zarr.open_array(tmp_path / "a.zarr", path="a/1", mode="r")
        np.testing.assert_array_equal(level[...], classes[::2, ::2])
