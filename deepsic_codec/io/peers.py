"""Other image codecs, to compare with: JPEG, JPEG 2000, WebP, AVIF, JPEG XL, through imagecodecs and Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import MissingPackage

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Peer:
    """Another codec: RGB image (H, W, 3) -> bytes at a setting -> image, on the calling thread alone.

    Attributes
    ----------
    name : str
        With what makes a difference: chroma subsampling, effort.
    settings : tuple of float
        From few bits to many, for curves.
    reach : (float, float)
        The settings of fewest and most bits that a search may try.
    encode, decode : callable
        Image and setting to bytes, and bytes to the image; raise MissingPackage without imagecodecs.
    whole : bool
        Whether a setting is a whole number.
    """

    name: str
    settings: tuple[float, ...]
    reach: tuple[float, float]
    encode: Callable[[Pixels, float], bytes]
    decode: Callable[[bytes], Pixels]
    whole: bool = False


def require(*packages: str) -> None:
    """Raise MissingPackage unless these packages are installed, without importing them."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingPackage(
            f"comparing codecs needs {' and '.join(missing)}: pip install 'deepsic-codec[compare]', "
            f"or pip install {' '.join(missing)}"
        )


def match_bytes(peer: Peer, image: Pixels, target: int, tolerance: float = 0.01) -> tuple[float, bytes]:
    """Search the setting at which a peer takes as many bytes as another codec.

    Parameters
    ----------
    peer : Peer
        The codec.
    image : uint8 array (H, W, 3)
        RGB.
    target : int
        Bytes.
    tolerance : float
        Part of `target` that is near enough to stop early.

    Returns
    -------
    (float, bytes)
        Setting and the image encoded with it, the nearest that was found: whole-numbered settings may have none that
        is nearer, and a codec may not go as low or as high.
    """
    tried: dict[float, bytes] = {}

    def size(setting: float) -> int:
        if setting not in tried:
            tried[setting] = peer.encode(image, setting)
        return len(tried[setting])

    few, many = peer.reach
    if size(few) < target < size(many):
        for _ in range(20):
            middle = _between(few, many, np.log(target / size(few)) / np.log(size(many) / size(few)), peer.whole)
            if middle in (few, many) or abs(size(middle) - target) <= tolerance * target:
                break
            few, many = (middle, many) if size(middle) < target else (few, middle)
    best = min(tried, key=lambda setting: abs(len(tried[setting]) - target))
    return best, tried[best]


def _between(few: float, many: float, part: float, whole: bool) -> float:
    """Interpolate between settings, not too near to either, so that the interval shrinks whatever the curve is."""
    part = float(np.clip(part, 0.1, 0.9))
    return float(round(few + part * (many - few))) if whole else float(few * (many / few) ** part)


def _codecs() -> Any:
    require("imagecodecs")
    import imagecodecs

    return imagecodecs


def _jpeg(subsampling: str) -> Callable[[Pixels, float], bytes]:
    return lambda x, level: bytes(_codecs().jpeg8_encode(x, level=int(level), subsampling=subsampling, optimize=True))


def _jpeg_decode(data: bytes) -> Pixels:
    return _codecs().jpeg8_decode(data)


def _jpeg2000_ratio(x: Pixels, ratio: float) -> bytes:
    """OpenJPEG told how many bytes to use; imagecodecs has only the other way, so this goes through Pillow."""
    from PIL import Image

    out = io.BytesIO()
    options: dict[str, Any] = {"irreversible": True, "mct": 1, "no_jp2": True}  # mct: Pillow's default leaves it out
    Image.fromarray(x).save(out, "JPEG2000", quality_mode="rates", quality_layers=[ratio], **options)
    return out.getvalue()


def _jpeg2000_psnr(x: Pixels, level: float) -> bytes:
    """OpenJPEG told which PSNR to reach."""
    return bytes(_codecs().jpeg2k_encode(x, level=level, codecformat="j2k", reversible=False, mct=True, numthreads=1))


def _jpeg2000_decode(data: bytes) -> Pixels:
    return _codecs().jpeg2k_decode(data, numthreads=1)


def _webp(x: Pixels, level: float) -> bytes:
    return bytes(_codecs().webp_encode(x, level=level, method=6, lossless=False))


def _webp_decode(data: bytes) -> Pixels:
    return _codecs().webp_decode(data)


def _avif(x: Pixels, level: float) -> bytes:
    return bytes(_codecs().avif_encode(x, level=int(level), speed=6, pixelformat="yuv444", numthreads=1))


def _avif_decode(data: bytes) -> Pixels:
    return _codecs().avif_decode(data, numthreads=1)


def _jpegxl(effort: int) -> Callable[[Pixels, float], bytes]:
    return lambda x, distance: bytes(_codecs().jpegxl_encode(x, distance=distance, effort=effort, numthreads=1))


def _jpegxl_decode(data: bytes) -> Pixels:
    return _codecs().jpegxl_decode(data, numthreads=1)


_JPEG = (5, 10, 15, 25, 35, 50, 65, 75, 85, 90)
_DISTANCES = (15, 11, 8, 6, 4, 3, 2, 1.5, 1, 0.6)
_RATIOS = (240, 160, 120, 80, 60, 48, 40, 30, 24, 20, 16, 12)

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("JPEG 4:2:0", _JPEG, (1, 100), _jpeg("420"), _jpeg_decode, whole=True),
        Peer("JPEG 4:4:4", _JPEG, (1, 100), _jpeg("444"), _jpeg_decode, whole=True),
        Peer("JPEG 2000 ratio", _RATIOS, (2000, 3), _jpeg2000_ratio, _jpeg2000_decode),
        Peer("JPEG 2000 PSNR", tuple(range(25, 41)), (15, 60), _jpeg2000_psnr, _jpeg2000_decode),
        Peer("WebP", (1, 5, 15, 30, 45, 60, 75, 85, 92), (0, 100), _webp, _webp_decode, whole=True),
        Peer("AVIF 4:4:4 s6", (15, 25, 35, 45, 55, 65, 75, 85), (1, 99), _avif, _avif_decode, whole=True),
        Peer("JPEG XL e3", _DISTANCES, (25, 0.1), _jpegxl(3), _jpegxl_decode),
        Peer("JPEG XL e7", _DISTANCES, (25, 0.1), _jpegxl(7), _jpegxl_decode),
    )
}
