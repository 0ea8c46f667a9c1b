"""Small real images that ship with the package. Their sources and licences are in `data/ATTRIBUTION.md`.

Reading them needs Pillow, which the extra `deepsic-codec[cli]` brings; without it they raise MissingPackage.
"""

import json
from importlib.resources import files
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.require import require

_DATA = files("deepsic_codec") / "data"
TILE = 64  # edge of a EuroSAT tile in pixels
LANDSAT_BANDS = ("blue", "green", "red", "nir", "swir16")  # B2 to B6
#: Attributes of the scene: band names and place, as `deepsic ingest` writes them.
LANDSAT_ATTRIBUTES = {
    "long_name": list(LANDSAT_BANDS),
    "crs": "EPSG:32617",
    "transform": [29.906404591398, 0.0, 703986.502389, 0.0, -29.883120236687, 4254601.8671],
}


def eurosat_mosaic() -> NDArray[np.uint8]:
    """Land-use mosaic of 12x16 EuroSAT validation tiles.

    Returns
    -------
    uint8 array (768, 1024, 3)
        RGB. The tiles were JPEG files once, so they tell nothing about lossless compression.
    """
    return _pixels("eurosat-mosaic.png")


def eurosat_classes() -> list[list[str]]:
    """Return the EuroSAT class of each tile of `eurosat_mosaic`: 12 rows of 16 names."""
    classes: list[list[str]] = json.loads((_DATA / "eurosat-mosaic.json").read_text())["classes"]
    return classes


def drone_frame() -> NDArray[np.uint8]:
    """Part of a photograph from an aerial survey: road, grass, trees, shadows.

    Returns
    -------
    uint8 array (1536, 2048, 3)
        RGB, from the camera's JPEG file.
    """
    return _pixels("drone-frame.jpg")


def landsat_scene() -> NDArray[np.uint16]:
    """Part of a scene of Landsat 8 at 30 m: forest, fields and a town in Virginia.

    Returns
    -------
    uint16 array (169, 186, 5)
        Digital numbers of the bands `LANDSAT_BANDS`: 0.00002 of reflectance each, with an offset of 5000.
    """
    bands = len(LANDSAT_BANDS)
    rows = _pixels("landsat8-elkton.png", mode=None)
    return np.ascontiguousarray(np.moveaxis(rows.reshape(bands, -1, rows.shape[1]), 0, -1))


def _pixels(name: str, mode: str | None = "RGB") -> NDArray[Any]:
    require("cli", "PIL")
    from PIL import Image

    with Image.open(BytesIO((_DATA / name).read_bytes())) as image:
        return np.asarray(image if mode is None else image.convert(mode))
