"""Other codecs, to compare with, through imagecodecs and Pillow.

`PEERS` store RGB images of 8 bits. `BAND_PEERS` store images of any number of bands: with loss at a setting, within a
bound on the error, or without loss; `measure_peer` measures one on a `Scene`. `LOSSLESS_PEERS` store RGB images of 8
bits without loss.

Peers that know no NoData get a scene with the mean of each band in its place, and the bytes of the mask, packed bits
with Zstd, count. Without loss or within a bound they can get it as it is, too: that counts if the NoData value comes
back exactly and nowhere else. JPEG XL takes values stretched to 16 bits with loss, since its quality is about
appearance; codecs of integers take floats stretched to 16 bits (JPEG 2000: 20).
"""

import io
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.require import require

Pixels = NDArray[np.uint8]
Samples = NDArray[Any]
Functions = tuple[Callable[[Pixels, float], bytes], Callable[[bytes], Pixels]]
RoundTrip = tuple[Callable[[], Sequence[bytes]], Callable[[Sequence[bytes]], Samples]]

LOSSY, LOSSLESS, BOUNDS = MODES = ("lossy", "lossless", "bounds")
AS_IS = ", NoData as it is"


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


@dataclass(frozen=True)
class BandPeer:
    """A codec of images of any number of bands that runs on the calling thread alone.

    Images are (height, width) or (height, width, bands). Integers are unsigned; JPEG 2000 takes int32, too.

    Attributes
    ----------
    name : str
        Name, with the options that matter.
    groups : tuple of str
        How it can be handed the bands: "all" at once, in "threes" as colours are, each "alone".
    decode : callable
        (bytes, image of the shape and dtype that comes back) -> array of that shape.
    lossless, bounded, lossy : callable, optional
        image -> bytes; (image, bound on the error in units of the samples) -> bytes, where decoded samples are rounded
        if the image has integers; (image, setting) -> bytes.
    distances : bool
        Whether a setting of `lossy` is a distance of JPEG XL; else it is about the RMS error in units of the samples.
    floats : bool
        Whether it takes float32.
    depth : int
        Bits of the integers that stand for float32 where it takes none.
    """

    name: str
    groups: tuple[str, ...]
    decode: Callable[[bytes, Samples], Samples]
    lossless: Callable[[Samples], bytes] | None = None
    bounded: Callable[[Samples, float], bytes] | None = None
    lossy: Callable[[Samples, float], bytes] | None = None
    distances: bool = False
    floats: bool = False
    depth: int = 16


def split_bands(image: Samples, group: str) -> list[Samples]:
    """Cut an image (height, width, bands) into parts: "all", "threes" (with the remainder alone) or "alone"."""
    bands = image.shape[2]
    if group == "all":
        return [image]
    threes = bands // 3 if group == "threes" else 0
    parts = [image[..., 3 * k : 3 * k + 3] for k in range(threes)] + [image[..., k] for k in range(3 * threes, bands)]
    return [np.ascontiguousarray(part) for part in parts]


def band_groups(peer: BandPeer, bands: int) -> list[str]:
    """Return the groups of a peer that differ for this number of bands."""
    if bands == 1:
        return ["alone"]
    names = [group for group in peer.groups if group != "threes" or bands >= 3]
    return [group for group in names if group != "all" or bands != 3 or "threes" not in names]


def _bands_first(image: Samples) -> Samples:
    return image if image.ndim == 2 else np.ascontiguousarray(np.moveaxis(image, -1, 0))


def _as_like(decoded: Samples, like: Samples) -> Samples:
    """Bring bands to the last axis if the codec left them on the first."""
    return decoded if decoded.shape == like.shape else np.moveaxis(decoded, 0, -1)


def _is_rgb(image: Samples) -> bool:
    return image.ndim == 3 and image.shape[2] == 3


def _bits(image: Samples) -> int:
    """Bits of the samples, with the sign of int32."""
    if image.dtype.itemsize <= 2:
        return 8 * image.dtype.itemsize
    return max(17, int(np.abs(image).max()).bit_length() + 1)  # imagecodecs garbles int32 of 16 bits and fewer


def _jpeg2000_bands(reversible: bool, colours: bool = True) -> Callable[[Samples, float], bytes]:
    """Encode with one slope of rate and distortion for all components, which the PSNR of them together decides.

    `colours` transforms three bands as red, green and blue.
    """

    def encode(image: Samples, error: float) -> bytes:
        bits = _bits(image)
        level = 20 * np.log10((2**bits - 1) / error) if error else 0
        options: dict[str, Any] = {} if image.dtype.itemsize <= 2 else {"bitspersample": bits}
        options |= {"reversible": reversible, "mct": colours and _is_rgb(image), "codecformat": "j2k"}
        return bytes(_imagecodecs().jpeg2k_encode(image, level=max(level, 0), **options, **_ONE_THREAD))

    return encode


#: Encode components that are decorrelated, with one slope of rate and distortion for all.
jpeg2000_components = _jpeg2000_bands(False, colours=False)


def _jpeg2000_lossless(image: Samples) -> bytes:
    return _jpeg2000_bands(True)(image, 0)


def _jpeg2000_samples(data: bytes, like: Samples) -> Samples:
    return _imagecodecs().jpeg2k_decode(data, **_ONE_THREAD)


def _htj2k(image: Samples, error: float) -> bytes:
    """Encode with OpenJPH; a uniform quantiser with step s leaves an RMS error of about s / 3 in its wavelet domain."""
    options: dict[str, Any] = {"rgb": True} if _is_rgb(image) else {"planar": image.ndim == 3}
    options |= {"reversible": False, "level": 3 * error / 2 ** _bits(image)} if error else {"reversible": True}
    return bytes(_imagecodecs().htj2k_encode(image if _is_rgb(image) else _bands_first(image), **options))


def _htj2k_lossless(image: Samples) -> bytes:
    return _htj2k(image, 0)


def _htj2k_samples(data: bytes, like: Samples) -> Samples:
    return _as_like(_imagecodecs().htj2k_decode(data), like)


def _jpegxl(image: Samples, distance: float) -> bytes:
    return bytes(_imagecodecs().jpegxl_encode(image, distance=distance, effort=7, **_ONE_THREAD))


def _jpegxl_lossless(image: Samples) -> bytes:
    options: dict[str, Any] = {"lossless": True, "effort": 7, **_ONE_THREAD}
    if image.ndim == 3 and not _is_rgb(image):
        image, options = _bands_first(image), options | {"planar": True, "photometric": "gray"}
    return bytes(_imagecodecs().jpegxl_encode(image, **options))


def _jpegxl_samples(data: bytes, like: Samples) -> Samples:
    return _as_like(_imagecodecs().jpegxl_decode(data, **_ONE_THREAD), like)


def _jpegxl_bounded(image: Samples, bound: float) -> bytes:
    """Quantise to the bound, then encode without loss; raises ValueError if that takes more than 16 bits."""
    low = float(image.min())
    step = 2 * bound + 1 if image.dtype.kind == "u" else 2 * bound * (1 - 1e-6)
    levels = np.floor((image.astype(np.float64) - low) / step + 0.5)
    if levels.max() > 65535:
        raise ValueError("more than 65536 levels")
    dtype = np.uint8 if levels.max() < 256 else np.uint16
    return struct.pack("<dd", low, step) + _jpegxl_lossless(levels.astype(dtype))


def _jpegxl_bounded_samples(data: bytes, like: Samples) -> Samples:
    low, step = struct.unpack_from("<dd", data)
    return low + step * _jpegxl_samples(data[16:], like)


def _jpegls(image: Samples, bound: float) -> bytes:
    return bytes(_imagecodecs().jpegls_encode(image, level=int(bound)))


def _lerc(image: Samples, bound: float) -> bytes:
    return bytes(_imagecodecs().lerc_encode(image, level=bound, compression="zstd"))


def _tolerance(image: Samples, bound: float) -> float:
    """Return the bound for a codec of floats; integers are rounded afterwards."""
    return bound + 0.49 if image.dtype.kind == "u" else bound


def _sperr(image: Samples, bound: float) -> bytes:
    level = _tolerance(image, bound)
    return bytes(_imagecodecs().sperr_encode(image.astype(np.float32), level=level, mode="pwe", **_ONE_THREAD))


def _sperr_lossy(image: Samples, error: float) -> bytes:
    level = 20 * np.log10(max(float(np.ptp(image)), 2 * error) / error)
    return bytes(_imagecodecs().sperr_encode(image.astype(np.float32), level=level, mode="psnr", **_ONE_THREAD))


def _sz3(image: Samples, bound: float) -> bytes:
    values = _bands_first(image).astype(np.float32)
    return bytes(_imagecodecs().sz3_encode(values, mode="abs", abs=_tolerance(image, bound)))


def _sz3_samples(data: bytes, like: Samples) -> Samples:
    values = _bands_first(like)
    return _as_like(_imagecodecs().sz3_decode(data, values.shape, np.float32), like)


def _zfp(image: Samples, bound: float) -> bytes:
    values = _bands_first(image).astype(np.float32)
    return bytes(_imagecodecs().zfp_encode(values, mode="a", level=_tolerance(image, bound), **_ONE_THREAD))


def _zfp_samples(data: bytes, like: Samples) -> Samples:
    return _as_like(_imagecodecs().zfp_decode(data), like)


def _pcodec(image: Samples) -> bytes:
    return bytes(_imagecodecs().pcodec_encode(_bands_first(image), level=12))


def _pcodec_samples(data: bytes, like: Samples) -> Samples:
    return _as_like(_imagecodecs().pcodec_decode(data, _bands_first(like).shape, like.dtype), like)


def _bitshuffle(image: Samples) -> bytes:
    planes = _bands_first(image)
    shuffled = _imagecodecs().bitshuffle_encode(planes.tobytes(), itemsize=planes.itemsize)
    return bytes(_imagecodecs().zstd_encode(shuffled, level=9))


def _bitshuffle_samples(data: bytes, like: Samples) -> Samples:
    shuffled = _imagecodecs().zstd_decode(data)
    planes = _imagecodecs().bitshuffle_decode(shuffled, itemsize=like.itemsize)
    return _as_like(np.frombuffer(planes, like.dtype).reshape(_bands_first(like).shape), like)


_ANY = ("all", "threes", "alone")

BAND_PEERS: dict[str, BandPeer] = {
    peer.name: peer
    for peer in (
        BandPeer(
            "JPEG 2000",
            _ANY,
            _jpeg2000_samples,
            _jpeg2000_lossless,
            lossy=_jpeg2000_bands(False),
            depth=20,
        ),
        BandPeer("JPEG 2000 5/3", _ANY, _jpeg2000_samples, lossy=_jpeg2000_bands(True), depth=20),
        BandPeer("HTJ2K", ("all", "threes"), _htj2k_samples, _htj2k_lossless, lossy=_htj2k),
        BandPeer("JPEG XL e7", _ANY, _jpegxl_samples, _jpegxl_lossless, lossy=_jpegxl, distances=True),
        BandPeer("quantised JPEG XL e7", _ANY, _jpegxl_bounded_samples, bounded=_jpegxl_bounded, floats=True),
        BandPeer(
            "JPEG-LS",
            ("alone",),
            lambda data, like: _imagecodecs().jpegls_decode(data),
            lambda image: _jpegls(image, 0),
            _jpegls,
        ),
        BandPeer(
            "LERC Zstd",
            ("all", "alone"),
            lambda data, like: _imagecodecs().lerc_decode(data),
            lambda image: _lerc(image, 0),
            _lerc,
            floats=True,
        ),
        BandPeer(
            "SPERR",
            ("alone",),
            lambda data, like: _imagecodecs().sperr_decode(data, **_ONE_THREAD),
            bounded=_sperr,
            lossy=_sperr_lossy,
            floats=True,
        ),
        BandPeer(
            "SZ3",
            ("all", "alone"),
            _sz3_samples,
            bounded=_sz3,
            lossy=lambda image, error: _sz3(image, 1.7 * error),
            floats=True,
        ),
        BandPeer(
            "ZFP",
            ("all", "alone"),
            _zfp_samples,
            bounded=_zfp,
            lossy=lambda image, error: _zfp(image, 8 * error),
            floats=True,
        ),
        BandPeer("pcodec", ("all",), _pcodec_samples, _pcodec, floats=True),
        BandPeer("bitshuffle Zstd", ("all",), _bitshuffle_samples, _bitshuffle, floats=True),
    )
}


def _rgb_peer(name: str, codec: str, decode: dict[str, Any] | None = None, **options: Any) -> BandPeer:
    """Return a lossless codec of imagecodecs for RGB images, given fixed options to encode and decode."""
    return BandPeer(
        name,
        ("all",),
        lambda data, like: getattr(_imagecodecs(), f"{codec}_decode")(data, **(decode or {})),
        lambda image: bytes(getattr(_imagecodecs(), f"{codec}_encode")(image, **options)),
    )


def _blosc(image: Samples) -> bytes:
    options: dict[str, Any] = {"level": 9, "compressor": "zstd", "shuffle": "shuffle", "typesize": image.itemsize}
    return bytes(_imagecodecs().blosc2_encode(image.tobytes(), **options))


def _blosc_samples(data: bytes, like: Samples) -> Samples:
    return np.frombuffer(_imagecodecs().blosc2_decode(data), like.dtype).reshape(like.shape)


LOSSLESS_PEERS: dict[str, BandPeer] = {
    peer.name: peer
    for peer in (
        BAND_PEERS["JPEG XL e7"],
        _rgb_peer("JPEG XL e3", "jpegxl", _ONE_THREAD, lossless=True, effort=3, **_ONE_THREAD),
        BAND_PEERS["JPEG 2000"],
        _rgb_peer("WebP", "webp", lossless=True, method=4),
        _rgb_peer("PNG", "png", level=9),
        BandPeer("Blosc-Zstd", ("all",), _blosc_samples, _blosc),
    )
}


@dataclass(frozen=True)
class Row:
    """A round trip of a scene through a codec.

    Attributes
    ----------
    scene, codec, group, mode : str
        Names; how the codec was handed the bands; one of `MODES`.
    target : float
        Setting with loss, bound as a multiple of `Scene.unit`.
    bits : float
        Per sample.
    rms, largest : float
        Errors over samples that are data, in units of the data.
    encode, decode : float
        MB/s of raw samples.
    kept : bool
        Whether the NoData value came back exactly and nowhere else; if not, the row does not count.
    """

    scene: str
    codec: str
    group: str
    mode: str
    target: float
    bits: float
    rms: float
    largest: float
    encode: float
    decode: float
    kept: bool = True

    @property
    def key(self) -> tuple[str, str, str, str, float]:
        """What is measured."""
        return self.scene, self.codec, self.group, self.mode, self.target


@dataclass(frozen=True, eq=False)
class Scene:
    """An image (height, width, bands) with its NoData value: a number, "NaN" or None.

    Bounds are multiples of `unit`, in units of the data.
    """

    name: str
    values: Samples
    nodata: Any = None
    unit: float = 1.0

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """Samples that are data."""
        return ~self.equal_nodata(self.values)

    def equal_nodata(self, values: Samples) -> NDArray[np.bool_]:
        """Return which values are the NoData value."""
        if self.nodata is None:
            return np.zeros(values.shape, bool)
        return np.isnan(values) if self.nodata == "NaN" else values == self.values.dtype.type(self.nodata)

    @cached_property
    def filled(self) -> Samples:
        """The scene with the mean of each band instead of NoData."""
        values = self.values.copy()
        for band in range(values.shape[2]):
            data = self.valid[..., band]
            mean = values[..., band][data].mean(dtype=np.float64) if data.any() else 0
            values[..., band][~data] = np.rint(mean) if values.dtype.kind in "iu" else mean
        return values

    @cached_property
    def mask(self) -> bytes:
        """The mask as packed bits with Zstd; empty if all samples are data."""
        if self.valid.all():
            return b""
        return bytes(_imagecodecs().zstd_encode(np.packbits(np.moveaxis(self.valid, -1, 0)).tobytes(), level=19))

    @cached_property
    def deviation(self) -> float:
        """Standard deviation of the samples that are data, over all bands."""
        return float(self.values[self.valid].std(dtype=np.float64)) or 1.0

    @property
    def is_float(self) -> bool:
        """Whether samples are floats."""
        return self.values.dtype.kind == "f"

    def limit(self, mode: str, target: float) -> float:
        """Return the largest error that a mode allows, in units of the data."""
        return {LOSSY: np.inf, LOSSLESS: 0.0, BOUNDS: target * self.unit}[mode]

    def measure(
        self,
        codec: str,
        group: str,
        mode: str,
        target: float,
        encode: Callable[[], Sequence[bytes]],
        decode: Callable[[Sequence[bytes]], Samples],
        tolerance: float = 0.0,
    ) -> tuple[Row, Samples]:
        """Measure a round trip, check it, and return the decoded samples, too.

        Raises
        ------
        ValueError
            If shape or dtype change, or the error is larger than the mode allows by more than the tolerance.
        """
        started = time.perf_counter()
        stored = encode()
        encoded = time.perf_counter()
        decoded = decode(stored)
        seconds = encoded - started, time.perf_counter() - encoded
        if decoded.shape != self.values.shape or decoded.dtype != self.values.dtype:
            raise ValueError(f"{self.name}, {codec}: decoded {decoded.dtype} {decoded.shape}")
        error = np.abs(decoded.astype(np.float64) - self.values)[self.valid]
        rms, largest = float(np.sqrt(np.square(error).mean())), float(error.max())
        limit = self.limit(mode, target) + tolerance
        if not largest <= limit:  # also if it is NaN
            raise ValueError(f"{self.name}, {codec}, {group}: error {largest}, bound {limit}")
        bits = 8 * sum(map(len, stored)) / self.values.size
        speeds = [self.values.nbytes / 1e6 / max(duration, 1e-9) for duration in seconds]
        return Row(self.name, codec, group, mode, target, bits, rms, largest, speeds[0], speeds[1]), decoded


def as_integers(values: Samples, bits: int) -> tuple[Samples, float, Callable[[Samples], Samples]]:
    """Return unsigned integers or, for more than 16 bits, int32 that stand for samples.

    Parameters
    ----------
    values : ndarray
        Samples.
    bits : int
        Stretch them to integers of this many bits; 0 leaves integers as they are and only makes them unsigned.

    Returns
    -------
    (ndarray, float, callable)
        Integers, the difference of two neighbours in units of the data, and the way back.
    """
    if bits == 0 or values.dtype == np.uint8:
        low, step = float(np.iinfo(values.dtype).min), 1.0
        integers = (values.astype(np.int64) - int(low)).astype(f"u{values.dtype.itemsize}")
    else:
        middle = 0 if bits <= 16 else 1 << (bits - 1)
        low = float(values.min())
        step = (float(values.max()) - low) / ((1 << bits) - 1) or 1.0
        integers = np.rint((values.astype(np.float64) - low) / step) - middle
        low, integers = low + middle * step, integers.astype(np.int32 if middle else np.uint16)
    return integers, step, lambda decoded: to_dtype(low + step * decoded.astype(np.float64), values.dtype)


def to_dtype(decoded: Samples, dtype: np.dtype[Any]) -> Samples:
    """Round and clip decoded numbers to a dtype."""
    if dtype.kind == "f":
        return decoded.astype(dtype)
    info = np.iinfo(dtype)
    return np.clip(np.rint(decoded), info.min, info.max).astype(dtype)


def round_trip(scene: Scene, peer: BandPeer, group: str, mode: str, target: float) -> RoundTrip:
    """Return how a peer encodes and decodes a scene.

    A lossy target is a distance of JPEG XL or an RMS error as a share of the standard deviation.
    """
    as_is = group.endswith(AS_IS)
    values = scene.values if as_is else scene.filled
    if scene.is_float and peer.floats:
        image, step, restore = values, 1.0, lambda decoded: to_dtype(decoded, values.dtype)
    else:
        stretched = scene.is_float or (mode == LOSSY and peer.distances)
        image, step, restore = as_integers(values, peer.depth if stretched else 0)
    parts = split_bands(image, group.removesuffix(AS_IS))
    setting = target if peer.distances else target * scene.deviation / step

    def encode() -> list[bytes]:
        if mode == LOSSLESS and peer.lossless is not None:
            payloads = [peer.lossless(part) for part in parts]
        elif mode == BOUNDS and peer.bounded is not None:
            payloads = [peer.bounded(part, scene.limit(mode, target)) for part in parts]
        elif mode == LOSSY and peer.lossy is not None:
            payloads = [peer.lossy(part, setting) for part in parts]
        else:
            raise ValueError(f"{peer.name} has no mode {mode}")
        return payloads if as_is else [*payloads, scene.mask]

    def decode(payloads: Sequence[bytes]) -> Samples:
        decoded = [peer.decode(payload, part) for payload, part in zip(payloads, parts, strict=False)]
        return restore(np.concatenate([part.reshape(*part.shape[:2], -1) for part in decoded], axis=2))

    return encode, decode


def measure_peer(scene: Scene, peer: BandPeer, group: str, mode: str, target: float) -> Row:
    """Measure a peer; the arguments are those of `round_trip`."""
    encode, decode = round_trip(scene, peer, group, mode, target)
    # Peers compute in float32.
    tolerance = float(np.spacing(np.abs(scene.values[scene.valid]).max())) if scene.is_float else 0.0
    row, decoded = scene.measure(peer.name, group, mode, target, encode, decode, tolerance)
    kept = not group.endswith(AS_IS) or np.array_equal(scene.equal_nodata(decoded), ~scene.valid)
    return replace(row, kept=kept)


def peer_groups(scene: Scene, peer: BandPeer, mode: str) -> list[str]:
    """Return in how many ways a peer takes the bands of a scene in a mode; none if it does not have the mode."""
    takes = {LOSSY: peer.lossy, LOSSLESS: peer.lossless, BOUNDS: peer.bounded}[mode] is not None
    if not takes or (mode != LOSSY and scene.is_float and not peer.floats):
        return []
    groups = band_groups(peer, scene.values.shape[2])
    if mode != LOSSY and not scene.is_float and not scene.valid.all():
        groups += [group + AS_IS for group in groups]
    return groups
