"""Small real images that ship with the package; ``data/ATTRIBUTION.md`` has their sources and terms."""

from __future__ import annotations

import json
from importlib.resources import files
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_DATA = files("deepsic_codec") / "data"
TILE = 64  # edge of a EuroSAT tile in pixels


def eurosat_mosaic() -> NDArray[np.uint8]:
    """Land-use mosaic of 12x16 EuroSAT validation tiles.

    Returns
    -------
    uint8 array (768, 1024, 3)
        RGB.  The tiles are JPEG-sourced, so no figure for lossless imagery can be taken from them.

    Notes
    -----
    MIT licence, (c) 2023 Patrick Helber; contains Copernicus Sentinel data.
    """
    return _pixels("eurosat-mosaic.png")


def eurosat_classes() -> list[list[str]]:
    """Class of every tile of `eurosat_mosaic`: 12 rows of 16 names, as EuroSAT labels them."""
    classes: list[list[str]] = json.loads((_DATA / "eurosat-mosaic.json").read_text())["classes"]
    return classes


def drone_frame() -> NDArray[np.uint8]:
    """Part of a frame from an aerial survey: road, grass, trees, shadows.

    Returns
    -------
    uint8 array (1536, 2048, 3)
        RGB, from the camera's JPEG.

    Notes
    -----
    BSD-2 licence, (c) 2017 Piero Toffanin.
    """
    return _pixels("drone-frame.jpg")


def _pixels(name: str) -> NDArray[np.uint8]:
    with Image.open(BytesIO((_DATA / name).read_bytes())) as image:
        return np.asarray(image.convert("RGB"))
