"""Transforms of parts and of reduced images, reference systems, and that reading a file reads no other."""

import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.io.georeference import attributes, open_raster, parse_crs
from deepsic_codec.stored.coordinates import reduced, shifted
from tests.common import check_rejects

TURNED = [2.0, 3.0, 500.0, 5.0, -7.0, 900.0]


def place(transform, row, column):
    a, b, c, d, e, f = transform
    return a * column + b * row + c, d * column + e * row + f


@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 0), (0, 9), (4, 9)])
def test_a_part_lies_where_it_lay(row, column):
    part = shifted(TURNED, row, column)
    for y, x in ((0, 0), (1, 0), (0, 1), (11, 13)):
        assert place(part, y, x) == place(TURNED, row + y, column + x)


def test_a_reduced_image_covers_the_same_ground():
    for y, x in ((0, 0), (1, 0), (0, 1), (11, 13)):
        assert place(reduced({"transform": TURNED}, 4)["transform"], y, x) == place(TURNED, 4 * y, 4 * x)


@pytest.mark.parametrize("crs", ["EPSG:32632", 32632, "wkt", "projjson", "projjson text"])
def test_reference_systems_are_parsed(crs):
    system = pytest.importorskip("rasterio.crs").CRS.from_epsg(32632)
    texts = {"wkt": system.to_wkt(), "projjson": system.to_dict(projjson=True)}
    texts["projjson text"] = json.dumps(texts["projjson"])
    assert parse_crs(texts.get(crs, crs)) == system


@pytest.mark.parametrize(
    "crs",
    [
        *(
            "http://127.0.0.1:9/crs",
            "https://x/EPSG:4326",
            "/vsicurl/http://127.0.0.1:9/crs.wkt",
            "file.wkt",
            "",
            "http:8",
        ),
        *(
            "+proj=longlat +nadgrids=/etc/passwd",
            "urn:ogc:def:crs:EPSG::4326",
            "EPSG:",
            "EPSG:0",
            "EPSG:99999999",
            "{",
            "{}",
        ),
        *({"proj": "longlat", "nadgrids": "a"}, {"init": "a:1", "type": "b"}, {"type": 1}, [], 1.5, True, 10**20, -1),
        *("PROJCS[" * 1000, '{"type":' * 10_000),
    ],
    ids=lambda crs: str(crs)[:40],
)
def test_other_reference_systems_are_refused(crs, tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    (tmp_path / "file.wkt").write_text(rasterio.crs.CRS.from_epsg(4326).to_wkt())
    monkeypatch.chdir(tmp_path)
    check_rejects(ConfigurationError, "crs: expected a code such as EPSG:32632", parse_crs, crs)


@pytest.fixture
def server(monkeypatch):
    """The address of a server on this machine, and the paths that it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *words):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_address[1]}", asked
        one.shutdown()


def test_files_beside_an_image_fetch_nothing(tmp_path, server):
    rasterio = pytest.importorskip("rasterio")
    host, asked = server
    profile = {"driver": "GTiff", "width": 20, "height": 30, "count": 1, "dtype": "uint8", "crs": "EPSG:32632"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile) as file:
        file.write(np.zeros((1, 30, 20), np.uint8))
    text = f'<MDI key="OVERVIEW_FILE">/vsicurl/{host}/a.tif</MDI>'
    text = f'<PAMDataset><SRS>{host}/crs</SRS><Metadata domain="OVERVIEWS">{text}</Metadata></PAMDataset>'
    (tmp_path / "a.tif.aux.xml").write_text(text)
    with open_raster(tmp_path / "a.tif") as file:
        assert file.read(1).shape == (30, 20) and file.read(1, out_shape=(3, 2)).shape == (3, 2)
        attributes(file)
    with pytest.raises(rasterio.errors.RasterioIOError), open_raster(Path(f"/vsicurl/{host}/a.tif")):
        pass
    assert not asked


def test_links_beside_an_image_are_not_read(tmp_path):
    Image.fromarray(np.zeros((30, 20), np.uint8)).save(tmp_path / "a.tif")
    (tmp_path / "private").write_text("10\n0\n0\n-10\n105\n895\n")
    (tmp_path / "a.tfw").symlink_to(tmp_path / "private")
    with open_raster(tmp_path / "a.tif") as file:
        assert attributes(file) == {}
    (tmp_path / "a.tfw").unlink()
    (tmp_path / "private").rename(tmp_path / "a.tfw")
    with open_raster(tmp_path / "a.tif") as file:
        assert attributes(file) == {"transform": [10, 0, 100, 0, -10, 900]}
