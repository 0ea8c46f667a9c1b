"""Other image codecs, to compare with: JPEG, JPEG 2000, WebP, AVIF, JPEG XL, through imagecodecs and Pillow."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.io.require import require

Pixels = NDArray[np.uint8]
Functions = tuple[Callable[[Pixels, float], bytes], Callable[[bytes], Pixels]]


@dataclass(frozen=True)
class Peer:
    """A codec of RGB images that runs on the calling thread alone.

    Attributes
    ----------
    name : str
        Name, with the options that matter: chroma subsampling, effort.
    settings : tuple of float
        Settings for a curve, from low to high rate.
    limits : (float, float)
        Settings of the lowest and the highest rate, between which `match_bytes` searches.
    encode : callable
        (uint8 array (H, W, 3), setting) -> bytes, or any object whose `len()` is a number of bytes.
    decode : callable
        What `encode` returned -> uint8 array (H, W, 3).
    integer : bool
        Whether settings are integers.
    """

    name: str
    settings: tuple[float, ...]
    limits: tuple[float, float]
    encode: Callable[[Any, float], Any]
    decode: Callable[[Any], Any]
    integer: bool = False


def match_bytes(peer: Peer, image: Any, target: int, tolerance: float = 0.01) -> tuple[float, Any]:
    """Search the setting at which a codec takes a number of bytes.

    Parameters
    ----------
    peer : Peer
        The codec.
    image : uint8 array (H, W, 3)
        RGB.
    target : int
        Bytes.
    tolerance : float
        Relative deviation at which the search stops early.

    Returns
    -------
    (float, bytes)
        The setting that came closest, and the image encoded with it. Integer settings may have none within the
        tolerance, and no codec reaches every rate.
    """
    tried: dict[float, Any] = {}

    def size(setting: float) -> int:
        if setting not in tried:
            tried[setting] = peer.encode(image, setting)
        return len(tried[setting])

    low, high = peer.limits
    if size(low) < target < size(high):
        for _ in range(20):
            middle = _between(low, high, np.log(target / size(low)) / np.log(size(high) / size(low)), peer.integer)
            if middle in (low, high) or abs(size(middle) - target) <= tolerance * target:
                break
            low, high = (middle, high) if size(middle) < target else (low, middle)
    best = min(tried, key=lambda setting: abs(len(tried[setting]) - target))
    return best, tried[best]


def _between(low: float, high: float, part: float, integer: bool) -> float:
    """Interpolate between settings, not too close to either, so that the interval shrinks with every step."""
    part = float(np.clip(part, 0.1, 0.9))
    return float(round(low + part * (high - low))) if integer else float(low * (high / low) ** part)


def _imagecodecs() -> Any:
    require("compare", "imagecodecs")
    import imagecodecs

    return imagecodecs


def _through_imagecodecs(name: str, setting: str, decode: dict[str, Any] | None = None, **options: Any) -> Functions:
    """Return how to encode and decode with a codec of imagecodecs, given the name of its setting and fixed options."""

    def encode_image(x: Pixels, value: float) -> bytes:
        return bytes(getattr(_imagecodecs(), f"{name}_encode")(x, **{setting: value}, **options))

    def decode_image(data: bytes) -> Pixels:
        return getattr(_imagecodecs(), f"{name}_decode")(data, **(decode or {}))

    return encode_image, decode_image


def _jpeg2000_at_ratio(x: Pixels, ratio: float) -> bytes:
    """Encode with OpenJPEG at a compression ratio, which imagecodecs does not offer and Pillow does."""
    require("compare", "PIL")
    from PIL import Image

    out = io.BytesIO()
    options: dict[str, Any] = {"irreversible": True, "mct": 1, "no_jp2": True}  # mct: Pillow's default leaves it out
    Image.fromarray(x).save(out, "JPEG2000", quality_mode="rates", quality_layers=[ratio], **options)
    return out.getvalue()


_ONE_THREAD = {"numthreads": 1}
_jpeg420 = _through_imagecodecs("jpeg8", "level", subsampling="420", optimize=True)
_jpeg444 = _through_imagecodecs("jpeg8", "level", subsampling="444", optimize=True)
_jpeg2000 = _through_imagecodecs(
    "jpeg2k", "level", _ONE_THREAD, codecformat="j2k", reversible=False, mct=True, **_ONE_THREAD
)
_webp = _through_imagecodecs("webp", "level", method=6, lossless=False)
_avif = _through_imagecodecs("avif", "level", _ONE_THREAD, speed=6, pixelformat="yuv444", **_ONE_THREAD)
_jpegxl3 = _through_imagecodecs("jpegxl", "distance", _ONE_THREAD, effort=3, **_ONE_THREAD)
_jpegxl7 = _through_imagecodecs("jpegxl", "distance", _ONE_THREAD, effort=7, **_ONE_THREAD)

_JPEG_LEVELS = (5, 10, 15, 25, 35, 50, 65, 75, 85, 90)
_DISTANCES = (15, 11, 8, 6, 4, 3, 2, 1.5, 1, 0.6)
_RATIOS = (240, 160, 120, 80, 60, 48, 40, 30, 24, 20, 16, 12)

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("JPEG 4:2:0", _JPEG_LEVELS, (1, 100), *_jpeg420, integer=True),
        Peer("JPEG 4:4:4", _JPEG_LEVELS, (1, 100), *_jpeg444, integer=True),
        Peer("JPEG 2000 ratio", _RATIOS, (2000, 3), _jpeg2000_at_ratio, _jpeg2000[1]),
        Peer("JPEG 2000 PSNR", tuple(range(25, 41)), (15, 60), *_jpeg2000),
        Peer("WebP", (1, 5, 15, 30, 45, 60, 75, 85, 92), (0, 100), *_webp, integer=True),
        Peer("AVIF 4:4:4 s6", (15, 25, 35, 45, 55, 65, 75, 85), (1, 99), *_avif, integer=True),
        Peer("JPEG XL e3", _DISTANCES, (25, 0.1), *_jpegxl3),
        Peer("JPEG XL e7", _DISTANCES, (25, 0.1), *_jpegxl7),
    )
}
