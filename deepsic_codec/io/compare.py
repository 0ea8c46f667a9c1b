"""Compare DeepSIC with other codecs on photographs at equal bytes: figures, pictures with an enlarged part, curves."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.io import draw
from deepsic_codec.io.images import ImageSource
from deepsic_codec.io.peers import PEERS, Peer, match_bytes
from deepsic_codec.metrics import errors, ms_ssim, psnr
from deepsic_codec.progress import Progress, no_progress
from deepsic_codec.require import require

if TYPE_CHECKING:
    from PIL import Image as PillowImage

Pixels = NDArray[np.uint8]

OURS = "DeepSIC"
DEFAULT = ("JPEG 4:2:0", "JPEG 2000 ratio", "WebP", "AVIF 4:4:4 s6", "JPEG XL e7")
CHUNK = 1024  # pixels: edge of the chunks in which DeepSIC stores a larger image, as an archive would
QUALITIES = (10, 25, 40, 55, 70, 85)  # of the curve
CURVE_POINTS = 6  # settings of a peer in a curve
MIN_EDGE, MAX_SIZE = 32, 1 << 28  # pixels along an edge, and samples, of what is compared as a photograph
MIN_MS_SSIM_EDGE = 176  # pixels: MS-SSIM has five scales
PART = (160, 120)  # width and height of the part that is enlarged
ZOOM = 3


@dataclass(frozen=True)
class Outcome:
    """Result of storing an image with a codec.

    Attributes
    ----------
    codec, image : str
        Names.
    setting : float
        Quality, ratio or distance, in the codec's own units.
    nbytes : int
        Bytes of everything that is stored; for DeepSIC this includes header and labels.
    bpp : float
        Bits per pixel.
    psnr, rmse, largest : float
        PSNR over RGB in dB (with the peak 255), root mean square error and largest error in grey levels.
    ms_ssim : float
        MS-SSIM; NaN for images with an edge below 176 pixels.
    encode_seconds, decode_seconds : float
        Times of one call each; NaN if not measured.
    """

    codec: str
    image: str
    setting: float
    nbytes: int
    bpp: float
    psnr: float
    rmse: float
    largest: float
    ms_ssim: float
    encode_seconds: float
    decode_seconds: float

    @classmethod
    def measure(
        cls,
        codec: str,
        image: str,
        setting: float,
        original: Pixels,
        decoded: Pixels,
        nbytes: int,
        seconds: tuple[float, float] = (float("nan"), float("nan")),
    ) -> "Outcome":
        """Compare a decoded image (uint8 (H, W, 3)) with its original."""
        height, width = original.shape[:2]
        similarity = ms_ssim(original, decoded) if min(height, width) >= MIN_MS_SSIM_EDGE else float("nan")
        bpp = 8 * nbytes / (height * width)
        differences = errors(original, decoded)
        return cls(
            codec, image, float(setting), nbytes, bpp, psnr(original, decoded), *differences, similarity, *seconds
        )


def is_photograph(source: ImageSource) -> bool:
    """Tell whether an image is compared as a photograph: 8 bits, red, green and blue, no place on a map, no NoData."""
    values, place = source.values, {"nodata", "crs", "transform", "gcps"} & source.attributes.keys()
    is_rgb = values.dtype == np.uint8 and source.axes == "yxc" and values.shape[2] == 3
    return (
        is_rgb and not place and not source.lossless and min(values.shape[:2]) >= MIN_EDGE and values.size <= MAX_SIZE
    )


@dataclass(frozen=True)
class Chunked:
    """An image stored with DeepSIC; its `len()` is the number of bytes of all payloads.

    Attributes
    ----------
    payloads : list of bytes
        The chunks, row by row.
    shape : tuple of int
        Shape of the image.
    """

    payloads: list[bytes]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return sum(map(len, self.payloads))


def deepsic(model: str = "base", chunk: int = CHUNK, **parameters: Any) -> Peer:
    """Return DeepSIC as a codec of whole images.

    Parameters
    ----------
    model : str
        Name of a model.
    chunk : int
        Largest edge of a chunk in pixels; larger images are stored in several chunks.
    **parameters
        Further parameters of `DeepSIC`, such as `effort`.
    """
    from deepsic_codec.codec.v2 import DeepSIC

    if chunk < 1:
        raise ConfigurationError(f"chunk: expected a positive number of pixels, got {chunk}")

    def regions(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
        rows, columns = ([slice(a, a + chunk) for a in range(0, size, chunk)] for size in shape[:2])
        return [(row, column) for row in rows for column in columns]

    def encode(image: Pixels, quality: float) -> Chunked:
        codec = DeepSIC(model=model, quality=round(quality, 2), **parameters)
        return Chunked(codec.encode_batch([image[region] for region in regions(image.shape)]), image.shape)

    def decode(chunked: Chunked) -> Pixels:
        image = np.empty(chunked.shape, np.uint8)
        decoded = DeepSIC(model=model).decode_batch(chunked.payloads)
        for region, pixels in zip(regions(chunked.shape), decoded, strict=True):
            image[region] = pixels
        return image

    return Peer(OURS, QUALITIES, (1, 100), encode, decode)


def at_equal_bytes(
    images: Sequence[tuple[str, Pixels]],
    *,
    quality: float = 50,
    bpp: float | None = None,
    codecs: Sequence[str] = DEFAULT,
    ours: Peer | None = None,
    progress: Progress = no_progress,
) -> Iterator[tuple[str, Pixels, list[tuple[Outcome, Pixels]]]]:
    """Store images with DeepSIC, then with each peer in as many bytes.

    Parameters
    ----------
    images : sequence of (str, uint8 array (H, W, 3))
        Names and pixels.
    quality : float
        Quality of DeepSIC.
    bpp : float, optional
        Bits per pixel for all codecs, instead of a quality.
    codecs : sequence of str
        Names in `deepsic_codec.io.peers.PEERS`.
    ours : Peer, optional
        DeepSIC as `deepsic` returns it.
    progress : callable
        Called with the number of encoded images, over all codecs, and of all to encode.

    Yields
    ------
    (str, uint8 array, list of (Outcome, uint8 array))
        Name, original, and the outcome and the decoded image of each codec, DeepSIC first.

    Raises
    ------
    ConfigurationError
        For an unknown codec.
    MissingPackage
        If imagecodecs is not installed.
    """
    peers = [ours or deepsic(), *find_peers(codecs)]
    done, total = 0, len(images) * len(peers)
    for name, image in images:
        peers[0].decode(peers[0].encode(image, quality))  # times do not include loading the model
        target = None if bpp is None else round(bpp * image.shape[0] * image.shape[1] / 8)
        results: list[tuple[Outcome, Pixels]] = []
        for peer in peers:
            setting = quality if target is None else match_bytes(peer, image, target)[0]
            results.append(_store(peer, name, image, setting))
            target = target or results[0][0].nbytes
            done += 1
            progress(done, total)
        yield name, image, results


def find_peers(codecs: Sequence[str]) -> list[Peer]:
    """Return peers by name.

    Raises
    ------
    ConfigurationError
        For an unknown name.
    MissingPackage
        If imagecodecs is not installed.
    """
    for codec in codecs:
        if codec not in PEERS:
            raise ConfigurationError(f"unknown codec {codec!r}; known are {', '.join(PEERS)}")
    if codecs:
        require("compare", "imagecodecs")
    return [PEERS[codec] for codec in codecs]


def _store(peer: Peer, name: str, image: Pixels, setting: float) -> tuple[Outcome, Pixels]:
    start = time.perf_counter()
    data = peer.encode(image, setting)
    middle = time.perf_counter()
    decoded = peer.decode(data)
    seconds = middle - start, time.perf_counter() - middle
    return Outcome.measure(peer.name, name, setting, image, decoded, len(data), seconds), decoded


def means(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Average over images, codec by codec in the order of their first appearance."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.codec, []).append(outcome)
    names = ("setting", "nbytes", "bpp", "psnr", "rmse", "largest", "ms_ssim", "encode_seconds", "decode_seconds")
    averages = []
    for group in groups.values():
        values: dict[str, Any] = {name: float(np.mean([getattr(outcome, name) for outcome in group])) for name in names}
        averages.append(replace(group[0], **values | {"image": "mean", "nbytes": round(values["nbytes"])}))
    return averages


def curves(
    images: Sequence[tuple[str, Pixels]],
    *,
    codecs: Sequence[str] = DEFAULT,
    ours: Peer | None = None,
    progress: Progress = no_progress,
) -> dict[str, list[Outcome]]:
    """Measure rate-distortion curves: by codec, the mean over images at each of several settings.

    The parameters are those of `at_equal_bytes`; `progress` counts settings.
    """
    peers = [ours or deepsic(), *find_peers(codecs)]
    done, total = 0, CURVE_POINTS * len(peers)
    result: dict[str, list[Outcome]] = {}
    for peer in peers:
        points: list[Outcome] = []
        numbers = np.linspace(0, len(peer.settings) - 1, CURVE_POINTS).round().astype(int)
        for setting in [peer.settings[number] for number in numbers]:
            points += means([_store(peer, name, image, setting)[0] for name, image in images])
            done += 1
            progress(done, total)
        result[peer.name] = sorted(points, key=lambda point: point.bpp)
    return result


def busiest(image: Pixels, part: tuple[int, int] = PART) -> tuple[int, int]:
    """Return row and column of the part (width, height) with the most edges among smooth areas: there codecs differ."""
    width, height = min(part[0], image.shape[1]), min(part[1], image.shape[0])
    grey = image.mean(axis=-1, dtype=np.float32)
    slopes = np.abs(np.diff(grey, axis=0, append=grey[-1:])) + np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    corners = np.ndindex(image.shape[0] // height, image.shape[1] // width)
    blocks = {(y * height, x * width): slopes[y * height :, x * width :][:height, :width] for y, x in corners}
    # Neither all slopes small nor all large.
    return max(blocks, key=lambda corner: blocks[corner].var() / (blocks[corner].mean() + 4))


def picture(
    name: str, original: Pixels, results: Sequence[tuple[Outcome, Pixels]], crop: tuple[int, int] | None = None
) -> "PillowImage.Image":
    """Draw an image with a frame around a part, and that part enlarged, original and as stored by each codec.

    Parameters
    ----------
    name : str
        Caption.
    original : uint8 array (H, W, 3)
        The image.
    results : sequence of (Outcome, uint8 array)
        Outcomes and decoded images.
    crop : (int, int), optional
        Row and column of the part; the busiest one by default.
    """
    require("cli", "PIL")
    from PIL import Image, ImageDraw, ImageOps

    width, height = min(PART[0], original.shape[1]), min(PART[1], original.shape[0])
    size = width * ZOOM, height * ZOOM
    y, x = busiest(original) if crop is None else crop
    y, x = min(y, original.shape[0] - height), min(x, original.shape[1] - width)

    def enlarged(pixels: Pixels) -> Image.Image:
        part = np.ascontiguousarray(pixels[y : y + height, x : x + width])
        return Image.fromarray(part).resize(size, Image.Resampling.NEAREST)

    whole = Image.fromarray(original)
    scale = min(size[0] / whole.width, size[1] / whole.height)
    whole = ImageOps.pad(whole, size, Image.Resampling.LANCZOS, draw.PAPER, (0, 0))
    frame = [round(edge * scale) for edge in (x, y, x + width, y + height)]
    ImageDraw.Draw(whole).rectangle(frame, outline=draw.FRAME, width=2)
    parts = [
        (f"{name}, {original.shape[1]} x {original.shape[0]}", "the frame shows the enlarged part", whole),
        ("Original, enlarged part", f"{original.nbytes:,} bytes", enlarged(original)),
    ]
    for outcome, pixels in results:
        note = f"{outcome.nbytes:,} bytes, {outcome.bpp:.2f} bpp, {outcome.psnr:.2f} dB"
        note += f", MS-SSIM {outcome.ms_ssim:.4f}" if np.isfinite(outcome.ms_ssim) else ""
        parts.append((outcome.codec, note, enlarged(pixels)))
    panels = [
        draw.sheet([(title, 17, draw.INK), (note, 14, draw.FAINT), image], size[0]) for title, note, image in parts
    ]
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3}.get(len(panels), 4)
    rows = [draw.side_by_side(panels[k : k + columns]) for k in range(0, len(panels), columns)]
    return draw.sheet(rows, max(row.width for row in rows))


def plot(path: str | Path, curves: dict[str, list[Outcome]], title: str) -> None:
    """Plot PSNR and MS-SSIM over bits per pixel.

    Raises
    ------
    MissingPackage
        If matplotlib is not installed.
    """
    require("compare", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")  # pyplot would keep the figure and open a window system
    measures = {"psnr": "PSNR (RGB), dB", "ms_ssim": "MS-SSIM, -10 log10(1 - x), dB"}
    max_bpp = max(point.bpp for points in ([curves[OURS]] if OURS in curves else curves.values()) for point in points)
    axes = figure.subplots(1, 2)
    for axis, (measure, label) in zip(axes, measures.items(), strict=True):
        for codec, points in curves.items():
            values = [getattr(point, measure) for point in points]
            if measure == "ms_ssim":
                values = [-10 * np.log10(1 - value) if value < 1 else np.nan for value in values]
            style: dict[str, Any] = {"lw": 1.3, "ms": 3}
            if codec == OURS:
                style = {"color": "black", "lw": 2.6, "ms": 5, "zorder": 3}
            axis.plot([point.bpp for point in points], values, "o-", label=codec, **style)
        axis.set(xlabel="bits per pixel", ylabel=label, xlim=(0, min(3.0, 1.05 * max_bpp)))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
