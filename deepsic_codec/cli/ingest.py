"""The command `ingest`."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from math import prod
from typing import TYPE_CHECKING, Any

from deepsic_codec.cli.console import progress_bar, say, say_json, say_table
from deepsic_codec.cli.options import (
    add_encoder_options,
    add_json,
    add_quality,
    bands,
    encoder_options,
    nodata,
    positive,
)

if TYPE_CHECKING:
    from deepsic_codec.io.images import ImageSource
    from deepsic_codec.io.ingest import Estimate, Ingested
    from deepsic_codec.io.zarr_source import PlainNode


LEFT_OUT = 3  # exit status


def add_ingest(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic ingest`."""
    add = parser.add_argument
    text = "image files (TIFF and GeoTIFF included), folders of them, Zarr arrays or groups"
    add("sources", nargs="+", metavar="SOURCE", help=text)
    add("url", metavar="URL", help="the archive, a Zarr group: a path or s3://...; made if needed")
    add("--stack", metavar="NAME", help="one array of all images, which must have the same size")
    add("--name", help="name of the array, if there is one source")
    add_quality(parser, None, " (default: 50, with --max-error 20)")
    add("--psnr", type=float, metavar="DB", help="PSNR of each chunk in dB, instead of a quality")
    add("--bpp", type=float, metavar="BITS", help="bits per pixel of each chunk, instead of a quality")
    add(
        "--rmse",
        type=float,
        metavar="E",
        help="root mean square error of each chunk in data units, instead of a quality",
    )
    add("--max-error", type=float, metavar="E", help="bound on the error of every sample; 0 is lossless")
    add_encoder_options(parser)
    text = "quality of what labels find, such as 'River=80', instead of --quality; may be repeated"
    add("--keep", action="append", type=_kept, metavar="EXPR=QUALITY", default=[], help=text)
    text = "image of one band, as large as the source: the quality of each pixel, or 0 where errors do not matter"
    add("--quality-map", metavar="IMAGE", help=text)
    text = (
        "range that quality and PSNR refer to (more pairs: of each band), or chunk: measured chunk by chunk (default: "
        "beyond 8 bits measured over the array, without outliers)"
    )
    add("--value-range", type=_value_range, metavar="LOW,HIGH", default=argparse.SUPPRESS, help=text)
    text = "value of pixels without data: a number, nan, or none (default: as declared by the source)"
    add("--nodata", type=nodata, metavar="VALUE", default=argparse.SUPPRESS, help=text)
    text = "features of networks, or wavelets (default: auto, for 8-bit colour what takes fewer bytes, else wavelets)"
    add("--transform", choices=("auto", "features", "wavelet"), default=argparse.SUPPRESS, help=text)
    text = "code what bands have in common once (auto, the default), or code each band by itself (none)"
    add("--spectral", choices=("auto", "none"), default=argparse.SUPPRESS, help=text)
    add("--chunk", type=positive, metavar="PIXELS", help="edge of a chunk (default: 512; 256 from 65 bands on)")
    add("--shard", type=positive, metavar="PIXELS", help="edge of a shard, a multiple of a chunk's (Zarr format 3)")
    add("--format", type=int, choices=(2, 3), default=3, help="Zarr format (default: 3)")
    text = "name of the model, or of a file of its folders (default: base)"
    add("--model", metavar="NAME", default=argparse.SUPPRESS, help=text)
    text = "head of the labels, such as scenes (default: that of the model)"
    add("--head", metavar="NAME", default=argparse.SUPPRESS, help=text)
    text = "when labels are computed (default: pre; none for palettes)"
    add("--semantics", choices=("pre", "post", "none"), default=argparse.SUPPRESS, help=text)
    text = "edge of the tiles that have labels of their own, a multiple of 64 (default: at most 4 along each axis)"
    add("--label-tile", type=int, metavar="PIXELS", default=argparse.SUPPRESS, help=text)
    text = "whether a tile has what one of its cells of 64 pixels shows (max, the default), or shows as a whole (mean)"
    add("--label-pooling", choices=("max", "mean"), default=argparse.SUPPRESS, help=text)
    add(
        "--label-bands",
        type=bands,
        metavar="R,G,B",
        default=argparse.SUPPRESS,
        help="bands that labels are scored on, by name or number",
    )
    text = "store embeddings of label tiles, for deepsic similar and deepsic learn"
    add("--embedding", action="store_true", default=argparse.SUPPRESS, help=text)
    add("--axes", help="axes of a Zarr array, such as yxc, if its dimensions are not named")
    add("--ome", action="store_true", help="store each image as an OME-Zarr pyramid (OME-NGFF 0.5; Zarr format 3)")
    add("--embed-model", action="store_true", help="store the model in the archive, for readers that do not have it")
    text = "say what would be stored, with size and time estimated from a few chunks, and write nothing"
    add("--dry-run", action="store_true", help=text)
    add("--resume", action="store_true", help="continue an interrupted run")
    add("--overwrite", action="store_true", help="replace existing arrays")
    add(
        "--skip-unreadable", action="store_true", help="list files that cannot be read and go on; reads each file twice"
    )
    add("--follow-links", action="store_true", help="follow symbolic links that lead out of the folders")
    add("--drop-alpha", action="store_true", help="leave out the transparency and the masks of images")
    add("--keep-alpha", action="store_true", help="store the transparency of images as a band")
    add("--batch-size", type=int, default=16, metavar="N", help="chunks encoded at once (default: 16)")
    add("--workers", type=int, metavar="N", help="threads (default: one for each core)")
    add_json(parser)


def _value_range(text: str) -> Any:
    if text == "chunk":
        return text
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(numbers) % 2:
        raise argparse.ArgumentTypeError(f"expected LOW,HIGH, more such pairs, or chunk, got {text!r}")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _kept(text: str) -> tuple[str, float]:
    expression, _, quality = text.rpartition("=")
    try:
        return expression, float(quality)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an expression and its quality, River=80, got {text!r}") from None


def run_ingest(args: argparse.Namespace) -> int:
    """Write the sources to the archive and print the results; returns 3 if something was left out."""
    from deepsic_codec.errors import ConfigurationError
    from deepsic_codec.io.ingest import copy_node, in_groups, ingest, ingest_pyramid
    from deepsic_codec.io.zarr_source import PlainNode
    from deepsic_codec.stored.location import refuse_zip_path

    skipped: list[str] = []
    renamed: list[str] = []
    plain: list[PlainNode] = []
    sources = list(_sources(args, skipped, renamed, plain))  # finds what cannot be opened before anything is written
    if len(sources) > 1:
        refuse_zip_path(args.url)
    _check_order(sources, args.url)
    names = (
        "quality",
        "psnr",
        "bpp",
        "rmse",
        "max_error",
        "transform",
        "spectral",
        "model",
        "head",
        "semantics",
        "label_tile",
        "label_pooling",
        "label_bands",
        "embedding",
        "value_range",
        "nodata",
    )
    codec = {name: getattr(args, name) for name in names if hasattr(args, name)}
    options: dict[str, Any] = {
        "codec": codec | encoder_options(args),
        "chunk": args.chunk,
        "shard": args.shard,
        "workers": args.workers,
        "batch_size": args.batch_size,
        "resume": args.resume and not args.overwrite,
        "overwrite": args.overwrite,
        "zarr_format": args.format,
        "embed_model": args.embed_model,
    }
    if args.quality_map and len(sources) > 1:
        raise ConfigurationError("--quality-map: it is for one source; pass one, or join them with --stack")
    if args.keep or args.quality_map:
        if args.dry_run:
            raise ConfigurationError("--dry-run: bytes of qualities of their own are not estimated; leave it out")
        options |= {"keep": dict(args.keep), "quality_map": _quality_map(args.quality_map)}
    if args.dry_run:
        return _dry_run(args, sources, options["codec"], [node.path for node in plain if node.is_array], skipped)
    results: list[Ingested] = []
    for source in sources if args.ome else in_groups(sources):  # a pyramid is a group
        with progress_bar(source.name) as progress:
            if args.ome:
                results += ingest_pyramid(source, args.url, progress=progress, **options)
            else:
                results.append(ingest(source, args.url, progress=progress, **options))
    problems = {node.path: copy_node(node, args.url, zarr_format=args.format) for node in plain}
    skipped += filter(None, problems.values())
    copied = [node.path for node in plain if node.is_array and problems[node.path] is None]
    if args.json:
        say_json({"arrays": list(map(asdict, results)), "copied": copied, "skipped": skipped, "renamed": renamed})
        return LEFT_OUT if skipped else 0
    _summary(results)
    for path in copied:
        say(f"copied as it is: {path}")
    for message in renamed:
        say(f"renamed: {message}")
    for message in skipped:
        say(f"skipped: {message}", error=args.quiet)
    return LEFT_OUT if skipped else 0


def _sources(
    args: argparse.Namespace, skipped: list[str], renamed: list[str], plain: list["PlainNode"]
) -> Iterator["ImageSource"]:
    from deepsic_codec.errors import ConfigurationError
    from deepsic_codec.io.sources import open_sources, stack

    skip = skipped.append if args.skip_unreadable else None
    sources = open_sources(
        args.sources,
        skip=skip,
        axes=args.axes,
        drop_alpha=args.drop_alpha,
        keep_alpha=args.keep_alpha,
        follow_links=args.follow_links,
        left_out=skipped.append,
        plain=None if args.stack or args.name else plain.append,
        renamed=(lambda message: None) if args.stack or args.name else renamed.append,
    )
    if args.stack:
        yield stack(list(sources), args.stack)
    elif args.name:
        first, *more = sources
        if more:
            raise ConfigurationError(f"--name {args.name}: there are several sources; use --stack to join them")
        yield replace(first, name=args.name)
    else:
        yield from sources


def _quality_map(path: str | None) -> Any:
    """Return the qualities of an image of one band, (y, x)."""
    if path is None:
        return None
    import numpy as np

    from deepsic_codec.errors import ConfigurationError
    from deepsic_codec.io.sources import open_sources

    values = [source.values for source in open_sources([path])]
    if len(values) != 1 or prod(values[0].shape) != prod(values[0].shape[:2]):
        raise ConfigurationError(f"--quality-map {path}: expected an image of one band")
    return np.asarray(values[0]).reshape(values[0].shape[:2])


def _dry_run(
    args: argparse.Namespace,
    sources: Sequence["ImageSource"],
    codec: dict[str, Any],
    copied: list[str],
    skipped: list[str],
) -> int:
    """Print what would be stored; returns the exit status."""
    from deepsic_codec.io.ingest import estimate

    estimates = []
    with progress_bar("estimating") as progress:
        for source in sources:
            estimates.append(estimate(source, codec=codec, chunk=args.chunk))
            progress(len(estimates), len(sources))
    if args.json:
        say_json({"arrays": list(map(asdict, estimates)), "copied": copied, "skipped": skipped})
        return LEFT_OUT if skipped else 0
    columns = ["array", "shape", "axes", "dtype", "nodata", "chunks", "raw bytes", "stored, about", "ratio"]
    columns += ["seconds, about", "from chunks", "PSNR dB", "its peak", "RMSE", "largest error"]
    rows = [
        [
            item.name,
            " x ".join(map(str, item.shape)),
            item.axes,
            item.dtype,
            "-" if item.nodata is None else f"{item.nodata:g}" if isinstance(item.nodata, float) else item.nodata,
            " x ".join(map(str, item.chunks)),
            f"{item.raw:,}",
            *_estimated([item]),
            f"{item.psnr:.2f}",
            *(f"{value:.4g}" for value in (item.peak, item.rmse, item.largest)),
        ]
        for item in estimates
    ]
    if len(estimates) > 1:
        total = f"{sum(item.raw for item in estimates):,}"
        rows.append([f"all {len(estimates)}", "", "", "", "", "", total, *_estimated(estimates), "", "", "", ""])
    say_table(columns, rows, left=("shape", "axes", "dtype", "nodata", "chunks"))
    _say_closer(estimates)
    for path in copied:
        say(f"to be copied as it is: {path}")
    for message in skipped:
        say(f"to be skipped: {message}", error=args.quiet)
    say("Nothing was written.")
    return LEFT_OUT if skipped else 0


def _estimated(estimates: Sequence["Estimate"]) -> list[str]:
    """Return the cells from "stored, about" to "from chunks", summed over arrays."""
    raw, stored, sampled, total = (
        sum(getattr(item, name) for item in estimates) for name in ("raw", "stored", "sampled", "total")
    )
    seconds = sum(item.seconds for item in estimates)
    return [f"{stored:,}", f"{raw / stored:.1f}" if stored else "-", f"{seconds:.1f}", f"{sampled:,} of {total:,}"]


def _say_closer(results: Sequence[Any]) -> None:
    """Say for which arrays a bound on the error is smaller and closer than what was asked for."""
    for result in results:
        if result.closer_bound is not None:
            bound = f"--max-error {result.closer_bound:g}"
            say(f"{result.name}: {bound} would be smaller and closer, as a chunk shows ({bound} alone, no quality)")


def _check_order(sources: Sequence["ImageSource"], url: str) -> None:
    """Raise ConfigurationError if an array would be replaced before another source reads it."""
    from deepsic_codec.errors import ConfigurationError
    from deepsic_codec.io.zarr_source import location_of
    from deepsic_codec.stored.location import to_store_path

    if not any(source.reads for source in sources):
        return
    try:
        root = to_store_path(url)
    except FileNotFoundError:
        return
    written: dict[str, str] = {}
    for source in sources:
        for location in source.reads:
            if location in written:
                raise ConfigurationError(
                    f"{source.name} is read from {location}, which {written[location]} would replace before; ingest it "
                    "first, or to another archive"
                )
        written[location_of(root / source.name)] = source.name


def _summary(results: Sequence["Ingested"]) -> None:
    from deepsic_codec.io.ingest import PSNR_CHUNKS

    columns = ["array", "shape", "raw bytes", "stored", "ratio"]
    columns += [f"PSNR dB ({PSNR_CHUNKS} chunks)", "its peak", "RMSE", "largest error"]
    columns += ["written", "complete", "empty", "MB/s", "labels (chunks)"]
    rows = [
        [
            result.name,
            " x ".join(map(str, result.shape)),
            *_sizes([result], f"{result.psnr:.2f}", *(f"{x:.4g}" for x in (result.peak, result.rmse, result.largest))),
            ", ".join(f"{name} {count}" for name, count in result.labels.items()) or "-",
        ]
        for result in results
    ]
    if len(results) > 1:
        rows.append([f"all {len(results)}", "", *_sizes(results, "", "", "", ""), ""])
    say_table(columns, rows, left=("shape", "labels (chunks)"))
    _say_closer(results)


def _sizes(results: Sequence["Ingested"], *errors: str) -> list[str]:
    """Return the cells from "raw bytes" to "MB/s", summed over arrays."""
    raw, stored, written, skipped, empty = (
        sum(getattr(result, name) for result in results) for name in ("raw", "stored", "written", "skipped", "empty")
    )
    speed = "-" if skipped else f"{raw / 1e6 / sum(result.seconds for result in results):.1f}"
    ratio = f"{raw / stored:.1f}" if stored else "-"
    return [f"{raw:,}", f"{stored:,}", ratio, *errors, str(written), str(skipped), str(empty), speed]
