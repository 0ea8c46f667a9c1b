"""The benchmark of round trips: it passes on a scene, and sees what is lost."""

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("xarray")

from benchmarks import roundtrips  # noqa: E402
from tests.common import photograph  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    image = np.moveaxis(photograph(40, 50, 2), -1, 0).astype("i4") * 1000
    profile = {"height": 40, "width": 50, "count": 2, "dtype": "int32", "nodata": int(image[0, 0, 0])}
    profile |= {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 500000, 0, -10, 5000000)}
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", **profile) as file:
        file.write(image)
        file.scales, file.offsets, file.units, file.descriptions = (0.5, 0.5), (1, 1), ("m", "m"), ("red", "nir")
        file.update_tags(SENSOR="x")
    return tmp_path


def test_a_scene_keeps_all_facts_in_all_ways(folder, capsys):
    assert roundtrips.main(["--images", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "24 facts equal, 0 lost, 0 not in the source; 0 ways refused" in printed


def test_what_is_lost_is_seen(folder):
    facts = roundtrips.told_by_gdal(folder / "a.tif")
    assert set(roundtrips.compare(facts, facts, 0).values()) == {"="}
    other = {key: ~facts[key] if key in ("pixels", "validity") else None for key in facts}
    other |= {"place": (9, 0, 0, 0, 9, 0), "units": ("m", "km")}
    assert set(roundtrips.compare(facts, other, 0).values()) == {"LOST", "DIFFERS"}
