"""The command `demo`: three real images stored, read back, and queried by their labels."""

import argparse
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsic_codec.cli.console import say, say_json, say_table
from deepsic_codec.cli.options import add_json, add_quality

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deepsic_codec.io.compare import Outcome
    from deepsic_codec.labels.query import Labels

STORE, PICTURE = "demo.zarr", "before-after.png"
WATER = ("River", "SeaLake")
QUERY = " | ".join(f"{name} > 0.5" for name in WATER)
CHUNKS = {"mosaic": 256, "drone": 512}  # edge in pixels
CROPS = {"mosaic": (256, 320), "drone": (640, 1056)}  # row and column of the enlarged part
SCENE, SCENE_EDGE, SCENE_RMSE = "landsat", 96, 75.0  # name, pixels of a chunk, digital numbers
UNIT, OFFSET = 0.00002, 5000  # reflectance of a digital number, digital number of no light
METADATA = ("zarr.json", ".zarray", ".zattrs")


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic demo`."""
    parser.add_argument("--format", type=int, choices=(2, 3), default=3, help="Zarr format (default: 3)")
    text = f"folder for {STORE} and {PICTURE}, which are replaced (default: deepsic-demo)"
    parser.add_argument("-o", "--out", type=Path, default=Path("deepsic-demo"), metavar="DIR", help=text)
    add_quality(parser)
    add_json(parser)


def run_demo(args: argparse.Namespace) -> None:
    """Write the sample images to an archive, read them back, and print figures and labels."""
    from deepsic_codec.require import require

    require("cli", "PIL")
    import zarr

    from deepsic_codec.codec.v2 import DeepSIC
    from deepsic_codec.io import draw
    from deepsic_codec.io.compare import picture
    from deepsic_codec.labels.consolidate import consolidate_labels
    from deepsic_codec.labels.open import open_labels
    from deepsic_codec.samples import TILE, drone_frame, eurosat_classes, eurosat_mosaic

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / STORE
    zarr.open_group(str(path), mode="w", zarr_format=args.format)
    if not args.json:
        say(f"Writing Zarr format {args.format}, quality {args.quality:g}, to {path}\n")
    originals = {"mosaic": eurosat_mosaic(), "drone": drone_frame()}
    codecs = {"mosaic": DeepSIC(quality=args.quality, label_tile=(TILE, TILE)), "drone": DeepSIC(quality=args.quality)}
    outcomes, drawings = [], []
    for name, original in originals.items():
        outcome, decoded = _store(path, name, original, CHUNKS[name], codecs[name], args.format)
        outcomes.append(outcome)
        drawings.append(picture(name, original, [(outcome, decoded)], CROPS[name]))
    file = args.out / PICTURE
    draw.sheet(drawings, max(drawing.width for drawing in drawings)).save(file)
    best = {name: _best_labels(open_labels(path, name, scan=True)) for name in originals}
    truth = [name for row in eurosat_classes() for name in row]
    right = Counter(name for name, label in zip(truth, best["mosaic"], strict=True) if name == label)
    answer = _query(path, outcomes[0].nbytes)
    scene = _store_scene(path, args.format)
    consolidate_labels(path)
    commands = [
        f"deepsic query {shlex.quote(str(path))} 'Forest > 0.5' --name mosaic",
        f"deepsic preview {shlex.quote(str(path))} --name {SCENE} --bands 2,1,0 -o {SCENE}.png",
        f"deepsic info {shlex.quote(str(path))} --name {SCENE}",
    ]
    if args.json:
        labels = {name: dict(Counter(names)) for name, names in best.items()}
        say_json(
            {
                "images": list(map(asdict, outcomes)),
                "labels": {**labels, "tiles": len(truth), "right": right.total()},
                "query": answer,
                "scene": scene,
                "commands": commands,
                "archive": str(path),
                "picture": str(file),
            }
        )
        return
    _print_savings(outcomes, [original.nbytes for original in originals.values()])
    _print_labels(Counter(truth), Counter(best["mosaic"]), right, Counter(best["drone"]))
    _print_query(answer)
    say(
        f"A scene of Landsat 8, bands {', '.join(scene['bands'])} of 16 bits, stored with rmse={SCENE_RMSE:g}: "
        f"{scene['nbytes']:,} of {scene['raw']:,} bytes."
    )
    say(
        f"RMS error {scene['rmse']:.1f} digital numbers, {UNIT * scene['rmse']:.4f} in reflectance; "
        f"of the vegetation index NDVI {scene['ndvi_rmse']:.4f}, which is {scene['ndvi_mean']:.2f} on average.\n"
    )
    say(f"Before and after: {file}\n")
    say("Try next:")
    for command in commands:
        say(f"  {command}")


def _store(
    path: Path, name: str, pixels: "NDArray[np.uint8]", edge: int, codec: Any, zarr_format: int
) -> "tuple[Outcome, NDArray[np.uint8]]":
    """Write an image and read it back."""
    import numpy as np

    from deepsic_codec.archive import create_array
    from deepsic_codec.io.compare import Outcome

    chunks = (edge, edge, 3)
    warm_up = create_array({}, data=pixels[:edge], chunks=chunks, codec=codec)  # loads the model, compiles the coder
    warm_up[:]
    array = create_array(
        path, name=name, shape=pixels.shape, chunks=chunks, dtype="u1", codec=codec, zarr_format=zarr_format
    )
    start = time.perf_counter()
    array[...] = pixels
    middle = time.perf_counter()
    decoded = np.asarray(array[...])
    seconds = middle - start, time.perf_counter() - middle
    title = f"DeepSIC quality {codec.quality:g}"
    return Outcome.measure(title, name, codec.quality, pixels, decoded, _stored(path, name), seconds), decoded


def _store_scene(path: Path, zarr_format: int) -> dict[str, Any]:
    """Write a scene of several bands of 16 bits and read it back; returns figures, those of its NDVI included."""
    import numpy as np

    from deepsic_codec.archive import create_array
    from deepsic_codec.codec.v2 import DeepSIC
    from deepsic_codec.samples import LANDSAT_ATTRIBUTES, LANDSAT_BANDS, landsat_scene

    pixels = landsat_scene()
    array = create_array(
        path,
        name=SCENE,
        data=pixels,
        chunks=(SCENE_EDGE, SCENE_EDGE, len(LANDSAT_BANDS)),
        codec=DeepSIC(rmse=SCENE_RMSE, label_bands=("red", "green", "blue"), label_tile=64),
        attributes=LANDSAT_ATTRIBUTES,
        zarr_format=zarr_format,
    )
    red, nir = LANDSAT_BANDS.index("red"), LANDSAT_BANDS.index("nir")

    def ndvi(values: "NDArray[np.float64]") -> "NDArray[np.float64]":
        return (values[..., nir] - values[..., red]) / (values[..., nir] + values[..., red])

    before, after = pixels.astype("f8") - OFFSET, np.asarray(array[...]).astype("f8") - OFFSET
    return {
        "bands": list(LANDSAT_BANDS),
        "raw": pixels.nbytes,
        "nbytes": _stored(path, SCENE),
        "rmse": float(np.sqrt(np.square(after - before).mean())),
        "ndvi_mean": float(ndvi(before).mean()),
        "ndvi_rmse": float(np.sqrt(np.square(ndvi(after) - ndvi(before)).mean())),
    }


def _stored(path: Path, name: str) -> int:
    """Return the bytes of the chunks of an array."""
    files = (file for file in (path / name).rglob("*") if file.is_file() and file.name not in METADATA)
    return sum(file.stat().st_size for file in files)


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


def _print_savings(outcomes: Sequence["Outcome"], sizes: Sequence[int]) -> None:
    columns = ["image", "raw bytes", "stored bytes", "ratio", "bpp", "PSNR dB", "encode Mpx/s", "decode Mpx/s"]
    rows = [
        [
            outcome.image,
            f"{size:,}",
            f"{outcome.nbytes:,}",
            f"{size / outcome.nbytes:.1f}",
            f"{outcome.bpp:.3f}",
            f"{outcome.psnr:.2f}",
            f"{size / 3e6 / outcome.encode_seconds:.1f}",
            f"{size / 3e6 / outcome.decode_seconds:.1f}",
        ]
        for outcome, size in zip(outcomes, sizes, strict=True)
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
