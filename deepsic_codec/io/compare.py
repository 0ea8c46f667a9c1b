"""Images through DeepSIC and other codecs at equal bytes: figures, pictures with enlarged parts, curves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError, UnsupportedArray
from deepsic_codec.io import draw
from deepsic_codec.io.images import read_rgb
from deepsic_codec.io.peers import PEERS, Peer, match_bytes, require
from deepsic_codec.metrics import ms_ssim, psnr

if TYPE_CHECKING:
    from PIL import Image as PillowImage

    from deepsic_codec.codec.v2 import DeepSIC

Pixels = NDArray[np.uint8]

OURS = "DeepSIC"
DEFAULT = ("JPEG 4:2:0", "JPEG 2000 ratio", "WebP", "AVIF 4:4:4 s6", "JPEG XL e7")
CHUNK = 1024  # pixels: a larger image is stored in chunks of at most this edge, as an archive would
QUALITIES = (10, 25, 40, 55, 70, 85)  # of the curve
STEPS = 6  # settings of a peer in the curve
PART = (160, 120)  # width and height of the part that is enlarged
ENLARGED = 3
SMALLEST = 176  # pixels: MS-SSIM has five scales


@dataclass(frozen=True)
class Outcome:
    """What a codec made of an image.

    Attributes
    ----------
    codec : str
        Name.
    setting : float
        Quality, ratio or distance, as the codec has it.
    image : str
        Name.
    nbytes : int
        Everything that is stored: of DeepSIC header and labels, too.
    bpp : float
        Bits per pixel.
    psnr : float
        Over RGB, in dB.
    ms_ssim : float
        NaN for images with an edge under 176 pixels.
    encode_seconds, decode_seconds : float
        One call each, after one that is not counted for DeepSIC (it loads the model), peers on one thread. NaN if not
        measured.
    """

    codec: str
    setting: float
    image: str
    nbytes: int
    bpp: float
    psnr: float
    ms_ssim: float
    encode_seconds: float
    decode_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, None for NaN and infinity."""
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(self).items()}


def read_image(path: str | Path) -> Pixels:
    """Read an image as RGB, uint8 (H, W, 3); values of more than 8 bits are stretched between their percentiles.

    Raises
    ------
    SourceError
        If it cannot be read, naming the file.
    UnsupportedArray
        If it is smaller than 32 pixels along an edge.
    """
    pixels = read_rgb(path)
    if min(pixels.shape[:2]) < 32:
        raise UnsupportedArray(f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels are too few to compare codecs on")
    return pixels


class Ours:
    """DeepSIC as a codec of whole images.

    Parameters
    ----------
    model : str
        Name of a model.
    chunk : int
        Largest edge of a chunk in pixels; larger images are stored in several.
    **options
        Further parameters of `DeepSIC`, such as `effort`.
    """

    def __init__(self, model: str = "base", chunk: int = CHUNK, **options: Any) -> None:
        if chunk < 1:
            raise ConfigurationError(f"chunk: expected a number of pixels, got {chunk}")
        self.model, self.chunk, self.options = model, chunk, options
        self._warm: set[tuple[int, ...]] = set()

    def warm_up(self, image: Pixels, quality: float) -> None:
        """Code an image once for each shape, so that times do not have the loading of the model in them."""
        if image.shape not in self._warm:
            self._warm.add(image.shape)
            self.decode(self.encode(image, quality), image.shape, quality)

    def _codec(self, quality: float) -> DeepSIC:
        from deepsic_codec.codec.v2 import DeepSIC

        return DeepSIC(model=self.model, quality=quality, **self.options)

    def encode(self, image: Pixels, quality: float) -> list[bytes]:
        """Encode the chunks of an image, row by row."""
        return self._codec(quality).encode_batch([image[part] for part in self._parts(image.shape)])

    def decode(self, payloads: list[bytes], shape: tuple[int, ...], quality: float) -> Pixels:
        """Put the image together again."""
        image = np.empty(shape, np.uint8)
        decoded = self._codec(quality).decode_batch(payloads)
        for part, pixels in zip(self._parts(shape), decoded, strict=True):
            image[part] = pixels
        return image

    def _parts(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
        for y in range(0, shape[0], self.chunk):
            for x in range(0, shape[1], self.chunk):
                yield slice(y, min(y + self.chunk, shape[0])), slice(x, min(x + self.chunk, shape[1]))

    def quality_for(self, image: Pixels, nbytes: int, tolerance: float = 0.01) -> float:
        """Search the quality at which an image takes so many bytes; the nearest end if none does."""
        peer = Peer(OURS, QUALITIES, (1, 100), lambda x, q: b"".join(self.encode(x, round(q, 2))), _never, whole=False)
        return round(match_bytes(peer, image, nbytes, tolerance)[0], 2)


def _never(data: bytes) -> Pixels:
    raise NotImplementedError


def at_equal_bytes(
    images: Sequence[tuple[str, Pixels]],
    *,
    quality: float | None = 50,
    bpp: float | None = None,
    codecs: Sequence[str] = DEFAULT,
    ours: Ours | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, Pixels, list[tuple[Outcome, Pixels]]]]:
    """Store images with DeepSIC, then with each peer in as many bytes.

    Parameters
    ----------
    images : sequence of (str, uint8 array (H, W, 3))
        Names and pixels.
    quality : float, optional
        Of DeepSIC.
    bpp : float, optional
        Bits per pixel for all of them, instead of a quality.
    codecs : sequence of str
        Names in `deepsic_codec.io.peers.PEERS`.
    ours : Ours, optional
        DeepSIC.
    progress : callable, optional
        Gets a text for each step.

    Yields
    ------
    (str, uint8 array, list of (Outcome, uint8 array))
        Name, original, and what each codec made of it, DeepSIC first.

    Raises
    ------
    ConfigurationError
        For a codec that there is not.
    MissingPackage
        Without imagecodecs.
    """
    check_codecs(codecs)
    ours = ours or Ours()
    say = progress or (lambda text: None)
    for name, image in images:
        say(f"{name}: {OURS}")
        target = None if bpp is None else round(bpp * image.shape[0] * image.shape[1] / 8)
        setting = float(quality or 50) if target is None else ours.quality_for(image, target)
        results = [_ours(ours, name, image, setting)]
        nbytes = results[0][0].nbytes if target is None else target
        for codec in codecs:
            say(f"{name}: {codec}")
            peer = PEERS[codec]
            found, _ = match_bytes(peer, image, nbytes)
            results.append(_through(peer, name, image, found))
        yield name, image, results


def check_codecs(codecs: Sequence[str]) -> None:
    """Raise ConfigurationError for a name that no peer has, MissingPackage if peers cannot run here."""
    for codec in codecs:
        if codec not in PEERS:
            raise ConfigurationError(f"no codec {codec!r} to compare with; known are {', '.join(PEERS)}")
    if codecs:
        require("imagecodecs")


def _ours(ours: Ours, name: str, image: Pixels, quality: float) -> tuple[Outcome, Pixels]:
    ours.warm_up(image, quality)
    start = time.perf_counter()
    payloads = ours.encode(image, quality)
    middle = time.perf_counter()
    decoded = ours.decode(payloads, image.shape, quality)
    end = time.perf_counter()
    nbytes = sum(map(len, payloads))
    return measure(OURS, quality, name, image, nbytes, decoded, middle - start, end - middle), decoded


def _through(peer: Peer, name: str, image: Pixels, setting: float) -> tuple[Outcome, Pixels]:
    start = time.perf_counter()
    data = peer.encode(image, setting)
    middle = time.perf_counter()
    decoded = peer.decode(data)
    end = time.perf_counter()
    return measure(peer.name, setting, name, image, len(data), decoded, middle - start, end - middle), decoded


def measure(
    codec: str,
    setting: float,
    name: str,
    image: Pixels,
    nbytes: int,
    decoded: Pixels,
    encode_seconds: float = float("nan"),
    decode_seconds: float = float("nan"),
) -> Outcome:
    """Compare a decoded image with its original; the names are those of `Outcome`."""
    height, width = image.shape[:2]
    similarity = ms_ssim(image, decoded) if min(height, width) >= SMALLEST else float("nan")
    bits = 8 * nbytes / (height * width)
    error = psnr(image, decoded)
    return Outcome(codec, float(setting), name, nbytes, bits, error, similarity, encode_seconds, decode_seconds)


def means(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Average over images, codec by codec in the order of their first appearance."""
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.codec, []).append(one)
    averages = []
    for codec, some in groups.items():
        values = {
            key: float(np.mean([getattr(one, key) for one in some]))
            for key in ("setting", "bpp", "psnr", "ms_ssim", "encode_seconds", "decode_seconds")
        }
        nbytes = round(float(np.mean([one.nbytes for one in some])))
        averages.append(replace(some[0], codec=codec, image="mean", nbytes=nbytes, **values))
    return averages


def curves(
    images: Sequence[tuple[str, Pixels]],
    *,
    codecs: Sequence[str] = DEFAULT,
    ours: Ours | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[Outcome]]:
    """Measure rate-distortion curves: the mean over images at each of some settings, by codec."""
    check_codecs(codecs)
    ours = ours or Ours()
    say = progress or (lambda text: None)
    result: dict[str, list[Outcome]] = {}
    for codec in (OURS, *codecs):
        settings = QUALITIES if codec == OURS else _some(PEERS[codec].settings)
        rows = []
        for setting in settings:
            say(f"curve: {codec} at {setting:g}")
            for_one = (
                (_ours(ours, name, image, setting) if codec == OURS else _through(PEERS[codec], name, image, setting))
                for name, image in images
            )
            rows += means([outcome for outcome, _ in for_one])
        result[codec] = sorted(rows, key=lambda row: row.bpp)
    return result


def _some(settings: Sequence[float]) -> list[float]:
    picked = np.unique(np.linspace(0, len(settings) - 1, STEPS).round().astype(int))
    return [settings[k] for k in picked]


def busiest(image: Pixels, part: tuple[int, int] = PART) -> tuple[int, int]:
    """Find the part of an image with the most detail that is not all noise: where codecs differ.

    Returns
    -------
    (int, int)
        Row and column of its top left corner; the part is `part` pixels wide and high, or the whole image.
    """
    width, height = min(part[0], image.shape[1]), min(part[1], image.shape[0])
    grey = image.mean(axis=-1, dtype=np.float32)
    best, place = -1.0, (0, 0)
    for y in range(0, image.shape[0] - height + 1, max(1, height // 2)):
        for x in range(0, image.shape[1] - width + 1, max(1, width // 2)):
            block = grey[y : y + height, x : x + width]
            slopes = np.abs(np.diff(block, axis=0))[:, :-1] + np.abs(np.diff(block, axis=1))[:-1]
            # Edges among smooth areas: neither all slopes small nor all large.
            interest = float(slopes.var() / (slopes.mean() + 4))
            if interest > best:
                best, place = interest, (y, x)
    return place


def picture(
    name: str, original: Pixels, results: Sequence[tuple[Outcome, Pixels]], crop: tuple[int, int] | None = None
) -> PillowImage.Image:
    """Draw the original with a frame around a part, and that part enlarged as each codec leaves it.

    Parameters
    ----------
    name : str
        Caption.
    original : uint8 array (H, W, 3)
        The image.
    results : sequence of (Outcome, uint8 array)
        What codecs made of it.
    crop : (int, int), optional
        Row and column of the part; the busiest one by default.
    """
    from PIL import Image, ImageDraw

    y, x = busiest(original) if crop is None else crop
    height, width = min(PART[1], original.shape[0]), min(PART[0], original.shape[1])
    y, x = min(y, original.shape[0] - height), min(x, original.shape[1] - width)
    size = width * ENLARGED, height * ENLARGED

    def panel(pixels: Pixels, title: str, note: str) -> PillowImage.Image:
        part = Image.fromarray(np.ascontiguousarray(pixels[y : y + height, x : x + width]))
        image = Image.new("RGB", (size[0], size[1] + 44), draw.PAPER)
        paint = ImageDraw.Draw(image)
        paint.text((0, 0), title, draw.INK, draw.font(17))
        paint.text((0, 22), note, draw.FAINT, draw.font(14))
        image.paste(part.resize(size, Image.Resampling.NEAREST), (0, 44))
        return image

    raw = original.nbytes
    panels = [panel(original, "Original, this part", f"{raw:,} bytes")]
    for outcome, pixels in results:
        note = f"{outcome.nbytes:,} bytes, {outcome.bpp:.2f} bpp, {outcome.psnr:.2f} dB"
        note += f", MS-SSIM {outcome.ms_ssim:.4f}" if np.isfinite(outcome.ms_ssim) else ""
        panels.append(panel(pixels, outcome.codec, note))
    whole = Image.fromarray(original)
    scale = min(size[0] / whole.width, size[1] / whole.height)
    edges = max(1, round(whole.width * scale)), max(1, round(whole.height * scale))
    whole = whole.resize(edges, Image.Resampling.LANCZOS)
    frame = [round(edge * scale) for edge in (x, y, x + width, y + height)]
    ImageDraw.Draw(whole).rectangle(frame, outline=(255, 220, 0), width=2)
    first = Image.new("RGB", (size[0], size[1] + 44), draw.PAPER)
    ImageDraw.Draw(first).text((0, 0), f"{name}, {original.shape[1]} x {original.shape[0]}", draw.INK, draw.font(17))
    ImageDraw.Draw(first).text((0, 22), "whole; framed: the part enlarged", draw.FAINT, draw.font(14))
    first.paste(whole, (0, 44))
    cells = [first, *panels]
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3}.get(len(cells), 4)
    rows = [draw.side_by_side(cells[k : k + columns]) for k in range(0, len(cells), columns)]
    return draw.sheet(rows, max(row.width for row in rows))


def plot(path: str | Path, measured: dict[str, list[Outcome]], title: str) -> None:
    """Draw PSNR and MS-SSIM over bits per pixel.

    Raises
    ------
    MissingPackage
        Without matplotlib.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")  # past pyplot, which would keep it and pick a window system
    axes = figure.subplots(1, 2)
    for axis, measure, label in zip(
        axes, ("psnr", "ms_ssim"), ("PSNR (RGB), dB", "MS-SSIM, -10 log10(1 - x), dB"), strict=True
    ):
        for codec, rows in measured.items():
            values = [getattr(row, measure) for row in rows]
            if measure == "ms_ssim":
                values = [-10 * np.log10(1 - value) if value < 1 else np.nan for value in values]
            style: dict[str, Any] = {"lw": 1.3, "ms": 3}
            if codec == OURS:
                style = {"color": "black", "lw": 2.6, "ms": 5, "zorder": 3}
            axis.plot([row.bpp for row in rows], values, "o-", label=codec, **style)
        axis.set(xlabel="bits per pixel", ylabel=label, xlim=(0, min(3.0, 1.05 * _longest(measured))))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _longest(measured: dict[str, list[Outcome]]) -> float:
    """Rate up to which DeepSIC was measured."""
    rows = measured.get(OURS) or [row for some in measured.values() for row in some]
    return max(row.bpp for row in rows)
