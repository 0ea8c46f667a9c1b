"""Small real images that ship with the package. Their sources and licences are in `data/ATTRIBUTION.md`.

Reading them needs Pillow, which the extra `deepsic-codec[cli]` brings; without it they raise MissingPackage.
"""

import json
from importlib.resources import files
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.require import require

_DATA = files("deepsic_codec") / "data"
TILE = 64  # edge of a EuroSAT tile in pixels


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


def _pixels(name: str) -> NDArray[np.uint8]:
    require("cli", "PIL")
    from PIL import Image

    with Image.open(BytesIO((_DATA / name).read_bytes())) as image:
        return np.asarray(image.convert("RGB"))
