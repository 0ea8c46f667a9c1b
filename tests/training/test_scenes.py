"""Scenes as training images: all bands, any depth, without NoData."""

import numpy as np
import pytest
import tifffile
import zarr

from deepsic_codec.training.data import Photographs, read_images
from deepsic_codec.training.scenes import to_pixels
from tests.common import photograph


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["u2", "i2", "f4"])
@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_every_band_of_a_tiff_is_read(tmp_path, dtype, bands):
    scene = (photograph(70, 80, 5)[..., :bands].astype("f8") * 30 - 900 * (dtype != "u2")).astype(dtype)
    options = {"planarconfig": "contig"} if bands > 1 else {}
    tifffile.imwrite(tmp_path / "s.tif", scene, photometric="minisblack", **options)
    images = [pixels for _, pixels in read_images(tmp_path)]
    assert [image.shape for image in images] == [(70, 80, 3)] * (2 if bands == 5 else 1)
    assert all(image.dtype == np.uint8 for image in images)
    found = np.concatenate(images, axis=-1)
    for band in range(bands):
        line = np.corrcoef(found[..., band].ravel(), scene[..., band].ravel())[0, 1]
        assert line > 0.98, (band, line)
    if bands == 2:
        np.testing.assert_array_equal(found[..., 2], found[..., 0])


def test_slices_and_bands_of_zarr_arrays(tmp_path):
    values = np.stack([photograph(64, 66, 4, seed=seed) for seed in (1, 2)]).astype("u2") * 100
    zarr.create_array(
        str(tmp_path / "a.zarr"), data=np.moveaxis(values, -1, 1), dimension_names=["time", "band", "y", "x"]
    )
    images = dict(read_images(tmp_path / "a.zarr"))
    assert len(images) == 4 and len({image.tobytes() for image in images.values()}) == 4
    again = dict(read_images(tmp_path / "a.zarr"))
    for name, image in images.items():
        np.testing.assert_array_equal(image, again[name], "another reading is stretched in another way")


@pytest.mark.parametrize(("dtype", "hole"), [("i2", -9999), ("f4", np.nan), ("f4", np.inf), ("f4", -3.4e38)])
def test_no_data_is_filled(dtype, hole):
    scene = photograph(64, 64, 1).astype(dtype) + 1000
    scene[:20, 5:40] = hole
    pixels = to_pixels(scene, hole if np.isfinite(hole) else None, rng())
    plain = to_pixels(np.delete(scene, np.s_[:20], axis=0), None, rng())
    data = pixels[20:]
    assert np.abs(data.astype(int) - plain).max() <= 2  # the hole has no part in the stretch
    inside = pixels[5:15, 10:35].astype(int)
    assert data.min() <= inside.min() and inside.max() <= data.max() and inside.std() < data.std()


def test_a_block_of_little_data_is_skipped(tmp_path):
    scene = np.full((64, 64), -1, "i2")
    scene[:8] = 5
    tifffile.imwrite(tmp_path / "empty.tif", scene, extratags=[(42113, 2, 0, "-1", True)])
    for seed in range(3):
        tifffile.imwrite(tmp_path / f"{seed}.tif", photograph(64, 64, seed=seed).astype("u2") * 90)
    photographs = Photographs([tmp_path], crop=64)
    assert len(photographs.held_out) + len(photographs.pool.heights) == 3
    assert len(photographs.skipped) == 1 and "no data" in photographs.skipped[0]


def test_eight_bits_stay_as_they_are_and_constants_are_even():
    image = photograph(20, 30, 3)
    np.testing.assert_array_equal(to_pixels(image, None, rng()), image)
    for value in (0, 700):
        assert np.ptp(to_pixels(np.full((9, 9, 2), value, "u2"), None, rng())) == 0


def test_stretches_differ_from_block_to_block():
    scene = photograph(64, 64, 1).astype("u2") * 100
    extents = [np.ptp(to_pixels(scene, None, np.random.default_rng(seed)).astype(int)) for seed in range(40)]
    assert min(extents) < 100 and max(extents) > 220
