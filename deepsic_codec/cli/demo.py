"""The command `demo`: two real images stored, read back, and queried by their labels."""

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsic_codec.cli.console import progress_bar, say, say_json, say_table
from deepsic_codec.cli.options import add_json, add_quality

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deepsic_codec.labels.query import Labels

STORE, PICTURE = "demo.zarr", "before-after.png"
WATER = ("River", "SeaLake")
QUERY = " | ".join(f"{name} > 0.5" for name in WATER)
CROPS = {"mosaic": (256, 320), "drone": (640, 1056)}  # row and column of the enlarged part
METADATA = ("zarr.json", ".zarray", ".zattrs")


@dataclass(frozen=True)
class Stored:
    """An image before and after storing it.

    Attributes
    ----------
    name : str
        Name of the array.
    original, decoded : uint8 array (H, W, 3)
        Pixels.
    nbytes : int
        Bytes of the chunk files.
    psnr : float
        In dB.
    encode_seconds, decode_seconds : float
        Times to write and to read all chunks.
    """

    name: str
    original: "NDArray[np.uint8]"
    decoded: "NDArray[np.uint8]"
    nbytes: int
    psnr: float
    encode_seconds: float
    decode_seconds: float

    @property
    def pixels(self) -> int:
        """Height times width."""
        return prod(self.original.shape[:2])

    def figures(self) -> dict[str, Any]:
        """Return the figures in JSON types."""
        return {
            "name": self.name,
            "raw_bytes": self.original.nbytes,
            "stored_bytes": self.nbytes,
            "bpp": 8 * self.nbytes / self.pixels,
            "psnr": self.psnr,
            "encode_seconds": self.encode_seconds,
            "decode_seconds": self.decode_seconds,
        }


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic demo`."""
    parser.add_argument("--format", type=int, choices=(2, 3), default=3, help="Zarr format (default: 3)")
    text = f"folder for {STORE} and {PICTURE}, which are replaced (default: deepsic-demo)"
    parser.add_argument("--out", type=Path, default=Path("deepsic-demo"), metavar="DIR", help=text)
    add_quality(parser)
    add_json(parser)


def run_demo(args: argparse.Namespace) -> None:
    """Write the sample images to an archive, read them back, and print figures and labels."""
    from deepsic_codec.io.require import require

    require("cli", "PIL")
    import zarr

    from deepsic_codec.codec.v2 import DeepSIC
    from deepsic_codec.labels.open import open_labels
    from deepsic_codec.samples import TILE, drone_frame, eurosat_classes, eurosat_mosaic

    args.out.mkdir(parents=True, exist_ok=True)
    path, picture = args.out / STORE, args.out / PICTURE
    zarr.open_group(str(path), mode="w", zarr_format=args.format)
    if not args.json:
        say(f"Writing Zarr format {args.format}, quality {args.quality:g}, to {path}\n")
    mosaic, drone = eurosat_mosaic(), drone_frame()
    images = [
        _store(path, "mosaic", mosaic, 256, DeepSIC(quality=args.quality, label_tile=(TILE, TILE)), args.format),
        _store(path, "drone", drone, 512, DeepSIC(quality=args.quality), args.format),
    ]
    _draw(images, args.quality).save(picture)
    best = {name: _best_labels(open_labels(path, name, scan=True)) for name in ("mosaic", "drone")}
    truth = [name for row in eurosat_classes() for name in row]
    right = Counter(name for name, label in zip(truth, best["mosaic"], strict=True) if name == label)
    answer = _query(path, images[0].nbytes)
    if args.json:
        labels = {name: dict(Counter(names)) for name, names in best.items()}
        say_json(
            {
                "images": [image.figures() for image in images],
                "labels": {**labels, "tiles": len(truth), "right": right.total()},
                "query": answer,
                "archive": str(path),
                "picture": str(picture),
            }
        )
        return
    _print_savings(images)
    _print_labels(Counter(truth), Counter(best["mosaic"]), right, Counter(best["drone"]))
    _print_query(answer)
    say(f"Before and after: {picture}")


def _store(path: Path, name: str, pixels: "NDArray[np.uint8]", edge: int, codec: Any, zarr_format: int) -> Stored:
    """Write an image a row of chunks at a time and read it back the same way."""
    import numpy as np

    from deepsic_codec.archive import create_array
    from deepsic_codec.metrics import psnr

    chunks = (edge, edge, 3)
    warm_up = create_array({}, data=pixels[:edge], chunks=chunks, codec=codec)  # loads the model, compiles the coder
    warm_up[:]
    array = create_array(
        path, name=name, shape=pixels.shape, chunks=chunks, dtype="u1", codec=codec, zarr_format=zarr_format
    )
    rows = [slice(top, top + edge) for top in range(0, len(pixels), edge)]
    decoded = np.empty_like(pixels)
    with progress_bar(name) as progress:
        start = time.perf_counter()
        for number, part in enumerate(rows):
            array[part] = pixels[part]
            if progress is not None:
                progress(number + 1, 2 * len(rows))
        middle = time.perf_counter()
        for number, part in enumerate(rows):
            decoded[part] = array[part]
            if progress is not None:
                progress(len(rows) + number + 1, 2 * len(rows))
        end = time.perf_counter()
    files = (file for file in (path / name).rglob("*") if file.is_file() and file.name not in METADATA)
    nbytes = sum(file.stat().st_size for file in files)
    return Stored(name, pixels, decoded, nbytes, psnr(pixels, decoded), middle - start, end - middle)


def _best_labels(labels: "Labels") -> list[str]:
    """Return the class with the highest score of each tile, row by row."""
    import numpy as np

    names = labels.vocabulary.names
    scores = np.nan_to_num(np.stack([labels.map(name).ravel() for name in names]))
    return [names[best] if score else "none" for best, score in zip(scores.argmax(0), scores.max(0), strict=True)]


def _query(path: Path, nbytes: int) -> dict[str, Any]:
    """Find the chunks of the mosaic that show water, by their headers alone."""
    from deepsic_codec.labels.open import open_labels
    from deepsic_codec.samples import TILE, eurosat_classes

    labels = open_labels(path, "mosaic", scan=True)
    selection = labels.where(QUERY)
    rows, columns = (edge // TILE for edge in labels.geometry.chunks[:2])
    truth = {
        (r // rows, c // columns)
        for r, row in enumerate(eurosat_classes())
        for c, name in enumerate(row)
        if name in WATER
    }
    return {
        "chunks": [list(index) for index in selection.chunks],
        "truth": [list(index) for index in sorted(truth)],
        "of": labels.geometry.count,
        "bytes_read": labels.bytes_read + selection.bytes_read,
        "bytes": nbytes,
    }


def _draw(images: list[Stored], quality: float) -> Any:
    """Draw each image, and a part of it enlarged before and after."""
    from deepsic_codec.io import draw
    from deepsic_codec.io.compare import Outcome, picture

    parts = []
    for image in images:
        name = f"DeepSIC quality {quality:g}"
        outcome = Outcome.measure(name, image.name, quality, image.original, image.decoded, image.nbytes)
        parts.append(picture(image.name, image.original, [(outcome, image.decoded)], CROPS[image.name]))
    return draw.sheet(parts, max(part.width for part in parts))


def _print_savings(images: list[Stored]) -> None:
    columns = ["image", "raw bytes", "stored bytes", "ratio", "bpp", "PSNR dB", "encode Mpx/s", "decode Mpx/s"]
    rows = [
        [
            image.name,
            f"{image.original.nbytes:,}",
            f"{image.nbytes:,}",
            f"{image.original.nbytes / image.nbytes:.1f}",
            f"{8 * image.nbytes / image.pixels:.3f}",
            f"{image.psnr:.2f}",
            f"{image.pixels / 1e6 / image.encode_seconds:.1f}",
            f"{image.pixels / 1e6 / image.decode_seconds:.1f}",
        ]
        for image in images
    ]
    say_table(columns, rows)
    say("Speed on this machine, files included, after a warm-up.\n")


def _print_labels(truth: Counter[str], mosaic: Counter[str], right: Counter[str], drone: Counter[str]) -> None:
    say("Best label of each tile")
    names = [*sorted(truth), *sorted({*mosaic, *drone} - {*truth})]
    columns = ["class", "mosaic, true", "predicted", "correct", "drone, predicted"]
    say_table(columns, [[name, *(str(counts[name]) for counts in (truth, mosaic, right, drone))] for name in names])
    agree, total = right.total(), truth.total()
    say(f"Labels agree with the true classes on {agree} of {total} tiles ({agree / total:.1%}).\n")


def _print_query(answer: dict[str, Any]) -> None:
    say(f"Which chunks of the mosaic satisfy {QUERY}?")
    for source, chunks in (("labels", answer["chunks"]), ("true classes", answer["truth"])):
        names = " ".join(f"{i}.{j}" for i, j, *_ in chunks)
        say(f"  {source + ':':<14}{len(chunks)} of {answer['of']}: {names}")
    times = answer["bytes"] / answer["bytes_read"]
    say(
        f"  Found by reading {answer['bytes_read']:,} bytes of metadata and chunk headers, decoding nothing. "
        f"The chunks hold {answer['bytes']:,} bytes, {times:.0f} times as many.\n"
    )
