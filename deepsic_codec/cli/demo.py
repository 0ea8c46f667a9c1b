"""`deepsic demo`: two real images through DeepSIC and back, with what that saves and what can be asked of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from deepsic_codec.archive import chunk_attrs, create_array
from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.metrics import psnr
from deepsic_codec.samples import TILE, drone_frame, eurosat_classes, eurosat_mosaic

if TYPE_CHECKING:
    from PIL import Image as PillowImage
    from rich.console import Console

Pixels = NDArray[np.uint8]
STORE = "demo.zarr"
PICTURE = "before-after.png"
QUERY = {"River": 0.5, "SeaLake": 0.5}  # water: either class above its score
ZOOM = {"mosaic": (256, 320), "drone": (640, 1056)}  # top left corner of the enlarged part


@dataclass(frozen=True)
class Stored:
    """One image after its way through the archive."""

    name: str
    original: Pixels  # (H, W, 3)
    decoded: Pixels
    nbytes: int  # of its chunk files on disk
    encode_seconds: float
    decode_seconds: float

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.original.shape[0] * self.original.shape[1]

    @property
    def bpp(self) -> float:
        """Stored bits per pixel."""
        return 8 * self.nbytes / self.pixels


def run(out: Path, *, zarr_format: int, quality: float, console: Console) -> dict[str, Any]:
    """Write the sample images to ``out/demo.zarr``, read them back and print what there is to see.

    Parameters
    ----------
    out : Path
        Folder for the archive and the picture; made if needed, an earlier demo in it is replaced.
    zarr_format : {2, 3}
        Zarr format.
    quality : float
        1 to 100.
    console : rich.console.Console
        Where to print.

    Returns
    -------
    dict
        What was printed, in JSON types: `images`, `labels`, `query`, and the files `archive` and `picture`.
    """
    # Mosaic in chunks of 4x4 EuroSAT tiles, with labels per EuroSAT tile.
    images = {"mosaic": (eurosat_mosaic(), 256, (TILE, TILE)), "drone": (drone_frame(), 512, None)}
    out.mkdir(parents=True, exist_ok=True)
    path = out / STORE
    root = zarr.open_group(str(path), mode="w", zarr_format=2 if zarr_format == 2 else 3)
    codecs = {name: DeepSIC(quality=quality, label_tile=tile) for name, (_, _, tile) in images.items()}

    _say(console, f"Writing Zarr format {zarr_format}, quality {quality:g}, to {path}")
    results = []
    with _progress(console) as advance:
        for name, (pixels, edge, _) in images.items():
            _warm_up(pixels, edge, codecs[name])
            array = create_array(
                root.store,
                name=name,
                shape=pixels.shape,
                chunks=(edge, edge, 3),
                dtype=pixels.dtype,
                codec=codecs[name],
                zarr_format=zarr_format,
            )
            results.append(_through(array, pixels, _chunk_bytes(path / name), advance))

    console.print(_savings(results))
    _say(console, "Speed on this machine, files included, after an uncounted row of chunks (compilation, model).\n")
    labels, query = _show_labels(console, root), _show_query(console, path)
    _picture(results, quality).save(out / PICTURE)
    _say(console, f"Before and after: {out / PICTURE}")
    files = {"archive": str(path), "picture": str(out / PICTURE)}
    return {"images": [_figures(r) for r in results], "labels": labels, "query": query, **files}


def _figures(r: Stored) -> dict[str, Any]:
    return {
        "name": r.name,
        "raw_bytes": r.original.nbytes,
        "stored_bytes": r.nbytes,
        "bpp": r.bpp,
        "psnr": psnr(r.original, r.decoded),
        "encode_seconds": r.encode_seconds,
        "decode_seconds": r.decode_seconds,
    }


def _say(console: Console, text: str) -> None:
    # As it stands: a path may hold brackets, which rich would take for markup, and must not be broken over lines.
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _through(
    array: zarr.Array, pixels: Pixels, stored_bytes: Callable[[], int], advance: Callable[[str, float], None]
) -> Stored:
    """Write an image a few rows of chunks at a time, read it back the same way."""
    bands = list(_bands(array))
    start = time.perf_counter()
    for i, rows in enumerate(bands):
        array[rows] = pixels[rows]
        advance(f"{array.basename}: encoding", (i + 1) / len(bands) / 2)
    encoded = time.perf_counter()
    decoded = np.empty_like(pixels)
    for i, rows in enumerate(bands):
        decoded[rows] = np.asarray(array[rows])
        advance(f"{array.basename}: decoding", 0.5 + (i + 1) / len(bands) / 2)
    seconds = time.perf_counter() - encoded
    return Stored(array.basename, pixels, decoded, stored_bytes(), encoded - start, seconds)


def _bands(array: zarr.Array) -> Iterator[slice]:
    height = array.chunks[0]
    return (slice(top, min(top + height, array.shape[0])) for top in range(0, array.shape[0], height))


def _warm_up(pixels: Pixels, edge: int, codec: DeepSIC) -> None:
    part = pixels[:edge]
    array = create_array(MemoryStore(), shape=part.shape, chunks=(edge, edge, 3), dtype=part.dtype, codec=codec)
    array[:] = part
    array[:]


def _chunk_bytes(folder: Path) -> Callable[[], int]:
    """Sum of the chunk files of an array; metadata files do not count."""
    metadata = {"zarr.json", ".zarray", ".zattrs"}
    return lambda: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name not in metadata)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Progress bars, one per image; gives a function of what is being done ("name: step") and the fraction done."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<18}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console) as bar:

        def advance(step: str, done: float) -> None:
            name = step.split(":")[0]
            if name not in tasks:
                tasks[name] = bar.add_task(step, total=1.0)
            bar.update(tasks[name], description=step, completed=done)

        yield advance


def _savings(results: list[Stored]) -> Any:
    from rich.table import Table

    table = Table("image", title="What it saves", title_justify="left")
    for column in ("raw bytes", "stored bytes", "ratio", "bpp", "PSNR dB", "encode Mpx/s", "decode Mpx/s"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            r.name,
            f"{r.original.nbytes:,}",
            f"{r.nbytes:,}",
            f"{r.original.nbytes / r.nbytes:.1f}",
            f"{r.bpp:.3f}",
            f"{psnr(r.original, r.decoded):.2f}",
            f"{r.pixels / 1e6 / r.encode_seconds:.1f}",
            f"{r.pixels / 1e6 / r.decode_seconds:.1f}",
        )
    return table


def _show_labels(console: Console, root: zarr.Group) -> dict[str, Any]:
    """Print the best label of every tile, and for the mosaic how many are right; returns these counts."""
    from rich.table import Table

    found = {name: _tile_labels(root[name]) for name in ("mosaic", "drone")}
    best = {name: [[next(iter(t), "none") for t in row] for row in rows] for name, rows in found.items()}
    truth = eurosat_classes()
    pairs = [(t, b) for ts, bs in zip(truth, best["mosaic"], strict=True) for t, b in zip(ts, bs, strict=True)]
    tiles, right = Counter(t for t, _ in pairs), Counter(t for t, b in pairs if t == b)

    table = Table("class", title="What is in it: best label of each tile", title_justify="left")
    for column in ("mosaic, true", "found", "found where true", "drone, found"):
        table.add_column(column, justify="right")
    in_mosaic = Counter(b for _, b in pairs)
    in_drone = Counter(b for row in best["drone"] for b in row)
    for name in [*sorted(tiles), *sorted({*in_mosaic, *in_drone} - set(tiles))]:
        table.add_row(name, *(str(counter[name]) for counter in (tiles, in_mosaic, right, in_drone)))
    console.print(table)
    agree = sum(right.values())
    _say(console, f"Labels agree with the true classes on {agree} of {len(pairs)} tiles ({agree / len(pairs):.1%}).\n")
    return {"mosaic": dict(in_mosaic), "drone": dict(in_drone), "tiles": len(pairs), "right": agree}


def _tile_labels(array: Any) -> list[list[dict[str, float]]]:
    """Labels of the whole array as rows of tiles, from the headers of its chunks."""
    rows: list[list[dict[str, float]]] = []
    for i in range(array.cdata_shape[0]):
        for j in range(array.cdata_shape[1]):
            attrs = chunk_attrs(array, (i, j, 0))
            across = -(-array.chunks[1] // attrs["tile_shape"][1])  # tiles in a row of the chunk
            labels = attrs["labels"]
            parts = [labels[k : k + across] for k in range(0, len(labels), across)]
            if j == 0:
                first = len(rows)
                rows += [[] for _ in parts]
            for k, part in enumerate(parts):
                rows[first + k] += part
    return rows


class _CountingStore(WrapperStore[LocalStore]):
    """A store that counts the bytes it hands out."""

    read = 0

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        data = await super().get(*args, **kwargs)
        self.read += 0 if data is None else len(data)
        return data


def _show_query(console: Console, path: Path) -> dict[str, Any]:
    """Print the chunks of the mosaic that show water, and how many bytes it took to find them; returns the same."""
    store = _CountingStore(LocalStore(path, read_only=True))
    array = zarr.open_array(store, path="mosaic", mode="r")
    store.read = 0  # what opening took is not the query's
    grid = np.ndindex(*array.cdata_shape)
    attrs = {index: chunk_attrs(array, index) for index in grid}
    hits = [i for i, a in attrs.items() if any(t.get(c, 0) > s for t in a["labels"] for c, s in QUERY.items())]
    total = sum(a["nbytes"] for a in attrs.values())

    question = " or ".join(f"{name} > {score:g}" for name, score in QUERY.items())
    _say(console, f"Which chunks of the mosaic have a tile with {question}?")
    for answer, chunks in {"labels": hits, "true classes": _chunks_with(array, set(QUERY))}.items():
        _say(
            console,
            f"  {answer + ':':<14}{len(chunks)} of {len(attrs)}: " + " ".join(f"{i}.{j}" for i, j, *_ in chunks),
        )
    _say(
        console,
        f"  Found by reading {store.read:,} bytes of chunk headers and decoding nothing; the chunks hold "
        f"{total:,} bytes, {total / store.read:.0f} times as many.\n",
    )
    return {"chunks": [list(index) for index in hits], "of": len(attrs), "bytes_read": store.read, "bytes": total}


def _chunks_with(array: zarr.Array, classes: set[str]) -> list[tuple[int, int]]:
    """Chunks of the mosaic that truly have a tile of one of the classes."""
    height, width = (edge // TILE for edge in array.chunks[:2])
    truth = enumerate(eurosat_classes())
    return sorted({(r // height, c // width) for r, row in truth for c, name in enumerate(row) if name in classes})


def _picture(results: list[Stored], quality: float) -> PillowImage.Image:
    """Original and decoded images side by side, with a part of each four times enlarged below."""
    from PIL import Image, ImageDraw, ImageFont

    width, part, gap, caption = 768, (192, 128), 8, 24
    font = ImageFont.load_default(size=15)

    def panel(pixels: Pixels, name: str, text: str) -> PillowImage.Image:
        whole = Image.fromarray(pixels)
        height = width * whole.height // whole.width
        y, x = ZOOM[name]
        zoomed = Image.fromarray(pixels[y : y + part[1], x : x + part[0]])
        size = (width, height + width * part[1] // part[0] + gap + caption)
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).text((4, 2), text, "black", font)
        image.paste(whole.resize((width, height), Image.Resampling.LANCZOS), (0, caption))
        enlarged = zoomed.resize((width, width * part[1] // part[0]), Image.Resampling.NEAREST)
        image.paste(enlarged, (0, caption + height + gap))
        return image

    rows = []
    for r in results:
        after = f"{r.name}, DeepSIC quality {quality:g}: {r.nbytes:,} bytes, {r.bpp:.2f} bpp"
        after += f", {psnr(r.original, r.decoded):.1f} dB"
        rows.append(
            (
                panel(r.original, r.name, f"{r.name}, original: {r.original.nbytes:,} bytes"),
                panel(r.decoded, r.name, after),
            )
        )
    sheet = Image.new("RGB", (2 * width + 3 * gap, sum(a.height + gap for a, _ in rows) + gap), "white")
    top = gap
    for before, after_panel in rows:
        sheet.paste(before, (gap, top))
        sheet.paste(after_panel, (2 * gap + width, top))
        top += before.height + gap
    return sheet
