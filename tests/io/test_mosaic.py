"""Thumbnails of what a selection has."""

import numpy as np
import pytest

from deepsic_codec import DeepSIC, consolidate_labels, create_array
from deepsic_codec.cli.main import main
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.io.draw import GAP
from deepsic_codec.io.mosaic import CAPTION, mosaic
from tests.common import check_rejects

pytestmark = pytest.mark.usefixtures("stub")


def scene():
    image = np.full((128, 192, 3), 20, "u1")
    image[:, 64:128], image[64:, 128:] = (250, 200, 210), (180, 255, 255)
    return image


def test_each_region_has_a_thumbnail(tmp_path, capsys):
    array = create_array(
        tmp_path / "a.zarr", name="img", data=scene(), chunks=(128, 64, 3), codec=DeepSIC(label_tile=64)
    )
    labels = consolidate_labels(array)
    found = labels.where("Bright", tiles=True)
    picture = np.asarray(mosaic(found, edge=32))
    assert picture.shape == (2 * (32 + CAPTION) + GAP, 2 * (32 + GAP) + GAP, 3) or picture.shape[1] > 100
    for number, region in enumerate(found.regions):
        columns = (picture.shape[1] - GAP) // (32 + GAP)
        y, x = GAP + number // columns * (32 + CAPTION) + 16, GAP + number % columns * (32 + GAP) + 16
        assert picture[y, x].tolist() == scene()[region][0, 0].tolist()
    assert np.asarray(mosaic(found, count=1, edge=32)).shape == (32 + CAPTION + GAP, 32 + 2 * GAP, 3)
    assert mosaic(labels.where("Bright > 1")).width > 0
    check_rejects(ConfigurationError, "thumbnails", mosaic, found, 0)
    assert main(["query", str(tmp_path / "a.zarr"), "Bright", "--tiles", "--mosaic", str(tmp_path / "a.png")]) == 0
    (chunk,) = (tmp_path / "a.zarr").glob("img/c/0/1/0")
    chunk.write_bytes(chunk.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"left out .*\(0, 1, 0\)"):
        damaged = np.asarray(mosaic(labels.where("Bright", tiles=True), edge=32))
    assert damaged.shape == picture.shape
    same = (damaged == picture).all(axis=2)
    assert same.mean() < 1 and same[:, -32:].all(), "others stay"
    assert "thumbnails: " in capsys.readouterr().err and (tmp_path / "a.png").stat().st_size > 100
