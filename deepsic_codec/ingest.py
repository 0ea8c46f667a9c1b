"""`deepsic ingest`: images, mosaics and Zarr arrays into an archive, with progress and a summary."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

if TYPE_CHECKING:
    from rich.console import Console

    from deepsic_codec.sources import ImageSource

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
    add("--quality", type=float, default=50.0, help="1 (smallest) to 100 (best) (default: 50)")
    add("--chunk", type=int, metavar="PIXELS", help="edge of a chunk (default: 512)")
    add("--shard", type=int, metavar="PIXELS", help="edge of a shard, a multiple of a chunk's (Zarr format 3)")
    add("--format", type=int, choices=(2, 3), default=3, help="Zarr format (default: 3)")
    add("--semantics", choices=("pre", "post", "none"), default="pre", help="when labels are computed (default: pre)")
    add("--axes", help="what the axes of a Zarr array are, such as yxc, if the names of its dimensions do not tell")
    add("--resume", action="store_true", help="go on where an interrupted run stopped")
    add("--overwrite", action="store_true", help="replace arrays that are there")
    add("--skip-unreadable", action="store_true", help="name what cannot be read and go on; reads each file twice")
    add("--drop-alpha", action="store_true", help="take images with transparency without it")
    add("--batch-size", type=int, default=16, metavar="N", help="chunks encoded at once (default: 16)")
    add("--workers", type=int, metavar="N", help="threads (default: as many as there are cores)")


def run(args: argparse.Namespace) -> None:
    """Write the sources to the archive and print what that gave."""
    from rich.console import Console

    console = Console(stderr=True) if sys.stderr.isatty() else Console(stderr=True, width=110)
    skipped: list[str] = []
    sources = list(_sources(args, skipped))  # what cannot be opened is found before anything is written
    results = [write(source, args, console) for source in sources]
    out = Console() if sys.stdout.isatty() else Console(width=140)
    out.print(summary(results))
    for message in skipped:
        print(f"skipped: {message}")


def _sources(args: argparse.Namespace, skipped: list[str]) -> Iterator[ImageSource]:
    from dataclasses import replace

    from deepsic_codec.errors import ConfigurationError
    from deepsic_codec.sources import open_sources, stack

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


def write(source: ImageSource, args: argparse.Namespace, console: Console) -> Ingested:
    """Store one source."""
    import dask

    from deepsic_codec import DeepSIC
    from deepsic_codec import dask as bulk

    codec = DeepSIC(quality=args.quality, axes=source.axes, semantics=args.semantics)
    shape = source.values.shape
    chunks: Any = "auto" if args.chunk is None else _edges(source.axes, shape, args.chunk, clip=True)
    shards = None if args.shard is None else _edges(source.axes, shape, args.shard, clip=False)
    start = time.perf_counter()
    delayed = bulk.store(
        source.values, args.url, name=source.name, codec=codec, chunks=chunks, shards=shards,
        batch_size=args.batch_size, resume=args.resume and not args.overwrite, overwrite=args.overwrite,
        zarr_format=args.format, attributes=source.attributes, compute=False,
    )  # fmt: skip
    tasks = sum(str(key).startswith("write_block-") for key in dict(delayed.dask))
    with _progress(console, source.name, tasks) as callback, callback, dask.config.set(scheduler="threads"):
        report = delayed.compute(num_workers=args.workers) if args.workers else delayed.compute()
    seconds = time.perf_counter() - start
    stored, labels = _contents(report)
    return Ingested(
        source.name, shape, int(source.values.nbytes), stored, report.written, report.skipped, report.empty, seconds,
        _psnr(source, report.array), labels,
    )  # fmt: skip


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
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
    )  # fmt: skip
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
    """PSNR over some chunks, the same ones in every run."""
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
    return psnr(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))


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
