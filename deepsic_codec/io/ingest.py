"""`deepsic ingest`: images, mosaics and Zarr arrays into an archive, with progress and a summary."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from deepsic_codec.cli.hints import add_hints, hints

if TYPE_CHECKING:
    from rich.console import Console

    from deepsic_codec.io.images import ImageSource

SAMPLE = 4  # chunks that are read back for PSNR
TOP = 3  # labels of an array in the summary


@dataclass(frozen=True)
class Ingested:
    """What became of one source.

    Attributes
    ----------
    name : str
        Path of the array.
    shape : tuple of int
        Its shape.
    raw, stored : int
        Bytes of its samples, and of all its payloads.
    written, skipped, empty : int
        Chunks.
    seconds : float
        Time for writing it.
    psnr : float
        In dB, over some of the chunks; NaN if nothing was stored.
    labels : dict of str to int
        Chunks that show a class, for the most frequent classes.
    """

    name: str
    shape: tuple[int, ...]
    raw: int
    stored: int
    written: int
    skipped: int
    empty: int
    seconds: float
    psnr: float
    labels: dict[str, int]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic ingest`."""
    add = parser.add_argument
    text = "image files (TIFF and GeoTIFF included), folders of them, Zarr arrays or groups"
    add("sources", nargs="+", metavar="SOURCE", help=text)
    add("url", metavar="URL", help="the archive, a Zarr group: a path or s3://...; made if needed")
    add("--stack", metavar="NAME", help="one array of all images, which have to be of equal size")
    add("--name", help="what to call the array, if there is one source")
    add("--quality", type=float, help="1 (smallest) to 100 (best) (default: 50, with --max-error 20)")
    add("--psnr", type=float, metavar="DB", help="PSNR that each chunk is to have, instead of a quality")
    add("--bpp", type=float, metavar="BITS", help="bits per pixel that each chunk is to have, instead of a quality")
    add("--max-error", type=float, metavar="E", help="bound on the error of every sample; 0 is lossless")
    add_hints(parser)
    text = "range of values that counts (more pairs: of each band), or chunk, its own (default beyond 8 bits)"
    add("--value-range", metavar="LOW,HIGH", help=text)
    add("--nodata", metavar="VALUE", help="value without data, a number or nan (default: what a GeoTIFF says); or none")
    add("--bands", choices=("planes", "triples"), help="how bands are joined (default: three are colours)")
    add("--chunk", type=int, metavar="PIXELS", help="edge of a chunk (default: 512)")
    add("--shard", type=int, metavar="PIXELS", help="edge of a shard, a multiple of a chunk's (Zarr format 3)")
    add("--format", type=int, choices=(2, 3), default=3, help="Zarr format (default: 3)")
    add("--semantics", choices=("pre", "post", "none"), default="pre", help="when labels are computed (default: pre)")
    add("--axes", help="what the axes of a Zarr array are, such as yxc, if the names of its dimensions do not tell")
    add("--ome", action="store_true", help="store each image as an OME-Zarr pyramid (OME-NGFF 0.5; Zarr format 3)")
    add("--embed-model", action="store_true", help="store the model in the archive, to read it where there is none")
    add("--resume", action="store_true", help="go on where an interrupted run stopped")
    add("--overwrite", action="store_true", help="replace arrays that are there")
    add("--skip-unreadable", action="store_true", help="name what cannot be read and go on; reads each file twice")
    add("--drop-alpha", action="store_true", help="take images with transparency without it")
    add("--batch-size", type=int, default=16, metavar="N", help="chunks encoded at once (default: 16)")
    add("--workers", type=int, metavar="N", help="threads (default: as many as there are cores)")
    add("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> None:
    """Write the sources to the archive and print what that gave."""
    from rich.console import Console

    console = Console(stderr=True) if sys.stderr.isatty() else Console(stderr=True, width=110)
    skipped: list[str] = []
    sources = list(_sources(args, skipped))  # what cannot be opened is found before anything is written
    results = [one for source in sources for one in (_pyramid if args.ome else _plain)(source, args, console)]
    if args.json:
        figures = [asdict(one) | {"psnr": one.psnr if np.isfinite(one.psnr) else None} for one in results]
        print(json.dumps({"arrays": figures, "skipped": skipped}))
        return
    out = Console() if sys.stdout.isatty() else Console(width=140)
    out.print(summary(results))
    for message in skipped:
        print(f"skipped: {message}")


def _sources(args: argparse.Namespace, skipped: list[str]) -> Iterator[ImageSource]:
    from dataclasses import replace

    from deepsic_codec.errors import ConfigurationError
    from deepsic_codec.io.images import open_sources, stack

    options = {"axes": args.axes, "drop_alpha": args.drop_alpha}
    found = open_sources(args.sources, skip=skipped.append if args.skip_unreadable else None, **options)
    if args.stack:
        yield stack(list(found), args.stack)
    elif args.name:
        one, *more = found
        if more:
            raise ConfigurationError(f"--name {args.name}: there is more than one source; use --stack to join them")
        yield replace(one, name=args.name)
    else:
        yield from found


def _plain(source: ImageSource, args: argparse.Namespace, console: Console) -> list[Ingested]:
    return [write(source, args, console)]


def _pyramid(source: ImageSource, args: argparse.Namespace, console: Console) -> list[Ingested]:
    """Store one source and its reductions, then say in the group what they are: until then, nobody takes it for one."""
    from deepsic_codec.errors import ConfigurationError
    from deepsic_codec.io import ome

    if args.format != 3:
        raise ConfigurationError(f"--ome: OME-NGFF {ome.VERSION} is of Zarr format 3, not {args.format}")
    levels = ome.pyramid(source, args.chunk, _nodata(source, args.nodata))
    group = ome.open_group(args.url, source.name)
    reduced = argparse.Namespace(**{**vars(args), "semantics": "none"})  # labels are for pixels of the original size
    results = [write(levels[0], args, console), *(write(level, reduced, console, index=False) for level in levels[1:])]
    group.attrs.update(ome.describe(source.name, [level.values for level in levels], levels[0].axes))
    return results


def write(source: ImageSource, args: argparse.Namespace, console: Console, index: Any = "auto") -> Ingested:
    """Store one source, and its label index unless `index` is False."""
    import dask

    from deepsic_codec import DeepSIC
    from deepsic_codec import dask as bulk

    codec = DeepSIC(
        quality=args.quality,
        psnr=args.psnr,
        bpp=args.bpp,
        max_error=args.max_error,
        axes=source.axes,
        bands=args.bands,
        value_range=_value_range(source, args.value_range),
        nodata=_nodata(source, args.nodata),
        semantics=args.semantics,
        encode=hints(args),
    )
    shape = source.values.shape
    chunks: Any = "auto" if args.chunk is None else _edges(source.axes, shape, args.chunk, clip=True)
    shards = None if args.shard is None else _edges(source.axes, shape, args.shard, clip=False)
    start = time.perf_counter()
    delayed = bulk.store(
        source.values,
        args.url,
        name=source.name,
        codec=codec,
        chunks=chunks,
        shards=shards,
        batch_size=args.batch_size,
        resume=args.resume and not args.overwrite,
        overwrite=args.overwrite,
        zarr_format=args.format,
        attributes=source.attributes,
        index=index,
        embed_model=args.embed_model,
        compute=False,
    )
    tasks = sum(str(key).startswith("write_block-") for key in dict(delayed.dask))
    with _progress(console, source.name, tasks) as callback, callback, dask.config.set(scheduler="threads"):
        report = delayed.compute(num_workers=args.workers) if args.workers else delayed.compute()
    seconds = time.perf_counter() - start
    stored, labels = _contents(report)
    return Ingested(
        source.name,
        shape,
        int(source.values.nbytes),
        stored,
        report.written,
        report.skipped,
        report.empty,
        seconds,
        _psnr(source, report.array),
        labels,
    )


def _value_range(source: ImageSource, text: str | None) -> Any:
    """Return the range as told; of 16 bits hardly any image uses all, and quality is spent on the range."""
    from deepsic_codec.errors import ConfigurationError

    if text is None or text == "chunk":
        return "chunk" if text or source.values.dtype.itemsize > 1 else None
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(numbers) % 2:
        raise ConfigurationError(f"--value-range: expected LOW,HIGH, more such pairs, or 'chunk', got {text!r}")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _nodata(source: ImageSource, text: str | None) -> Any:
    """Return the NoData value: as told, or what the source says of itself if its samples can have it."""
    from deepsic_codec.errors import ConfigurationError

    if text is not None:
        try:
            return None if text.lower() == "none" else float(text)
        except ValueError:
            raise ConfigurationError(f"--nodata: expected a number, nan or none, got {text!r}") from None
    value, dtype = source.attributes.get("nodata"), source.values.dtype
    if value is None or dtype.kind == "f":
        return "NaN" if value == "NaN" else value if isinstance(value, int | float) else None
    # Files often declare a value that their samples cannot have, left from another dtype.
    info = np.iinfo(dtype)
    fits = isinstance(value, int | float) and value == int(value) and info.min <= value <= info.max
    return value if fits else None


def _edges(axes: str, shape: Sequence[int], edge: int, clip: bool) -> tuple[int, ...]:
    sizes = zip(axes, shape, strict=True)
    return tuple((min(edge, size) if clip else edge) if a in "yx" else size if a == "c" else 1 for a, size in sizes)


@contextmanager
def _progress(console: Console, name: str, tasks: int) -> Iterator[Any]:
    """Show a bar; gives a Dask callback that moves it."""
    from dask.callbacks import Callback
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from deepsic_codec.bulk.write import Written

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=tasks or 1, completed=not tasks, speed="")
        began, done = time.perf_counter(), {"samples": 0, "bytes": 0}

        def posttask(key: Any, value: Any, *rest: Any) -> None:
            if isinstance(value, Written):
                done["samples"] += value.samples
                done["bytes"] += value.nbytes
                seconds = time.perf_counter() - began
                speed = f"{done['samples'] / 1e6 / seconds:.1f} MB/s read, {done['bytes'] / 1e6:.1f} MB stored"
                bar.update(task, advance=1, speed=speed)

        yield Callback(posttask=posttask)


def _contents(report: Any) -> tuple[int, dict[str, int]]:
    """Bytes of all payloads of an array, and its most frequent labels."""
    from deepsic_codec.labels.query import open_labels

    if report.index is None:
        return report.nbytes, {}
    labels = open_labels(report.array)
    sizes = labels.index.group["nbytes"]
    assert isinstance(sizes, zarr.Array)
    counts = labels.summary()["classes"]
    best = sorted(((counts[name], name) for name in labels.vocabulary.names), reverse=True)[:TOP]
    return int(np.asarray(sizes[...]).sum(dtype=np.int64)), {name: count for count, name in best if count}


def _psnr(source: ImageSource, array: zarr.Array) -> float:
    """PSNR over some chunks, the same ones in every run; its peak is 255 for uint8, else the range of what is there."""
    from deepsic_codec.metrics import psnr

    grid = [-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True)]
    total = int(np.prod(grid))
    picked = np.random.default_rng(0).choice(total, min(SAMPLE, total), replace=False)
    pairs = []
    for number in sorted(picked.tolist()):
        place = np.unravel_index(number, grid)
        region = tuple(slice(int(i) * n, (int(i) + 1) * n) for i, n in zip(place, array.chunks, strict=True))
        original = np.asarray(source.values[region].compute())
        pairs.append((original.ravel(), np.asarray(array[region]).ravel()))
    if not pairs:
        return float("nan")
    originals, decoded = (np.concatenate([pair[k] for pair in pairs]) for k in (0, 1))
    data = ~_without_data(originals, array)
    originals, decoded = originals[data], decoded[data]
    if not originals.size:
        return float("nan")
    peak = 255.0 if array.dtype == np.uint8 else float(np.ptp(originals.astype(np.float64))) or 1.0
    return psnr(originals, decoded, peak)


def _without_data(values: np.ndarray, array: zarr.Array) -> np.ndarray:
    from deepsic_codec.codec.scaled import nodata_value
    from deepsic_codec.stored.layout import codec_of

    config = codec_of(array)
    if config.nodata is None:
        return np.zeros(values.shape, bool)
    value = nodata_value(config, values.dtype.newbyteorder("="))
    return np.isnan(values) if value != value else values == value


def summary(results: Sequence[Ingested]) -> Any:
    """Return a table of what was stored."""
    from rich.table import Table

    table = Table("array", "shape")
    sampled = f"PSNR dB ({SAMPLE} chunks)"
    for column in ("raw bytes", "stored", "ratio", sampled, "written", "complete", "empty", "MB/s"):
        table.add_column(column, justify="right")
    table.add_column("labels (chunks)")
    for one in results:
        table.add_row(
            one.name,
            " x ".join(map(str, one.shape)),
            f"{one.raw:,}",
            f"{one.stored:,}",
            f"{one.raw / one.stored:.1f}" if one.stored else "-",
            f"{one.psnr:.2f}",
            *(str(count) for count in (one.written, one.skipped, one.empty)),
            "-" if one.skipped else f"{one.raw / 1e6 / one.seconds:.1f}",
            _labels(one.labels),
        )
    if len(results) > 1:
        raw, stored = (sum(getattr(one, name) for one in results) for name in ("raw", "stored"))
        counts = (sum(getattr(one, name) for one in results) for name in ("written", "skipped", "empty"))
        ratio = f"{raw / stored:.1f}" if stored else "-"
        resumed = any(one.skipped for one in results)
        speed = "-" if resumed else f"{raw / 1e6 / sum(one.seconds for one in results):.1f}"
        table.add_row(f"all {len(results)}", "", f"{raw:,}", f"{stored:,}", ratio, "", *map(str, counts), speed, "")
    return table


def _labels(labels: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in labels.items()) or "-"
