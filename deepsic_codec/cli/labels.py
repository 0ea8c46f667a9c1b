"""The subcommands `labels`, `query` and `index`: arguments, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsic_codec.cli.console import progress_bar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deepsic_codec.labels.query import Labels, Match, Selection

MAP_EDGE = 512  # pixels: tiles are enlarged to about this, so that a map of 16 tiles can be seen
ROWS = 20  # of the table that `query` prints


def labels_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic labels`."""
    _source(parser)
    parser.add_argument("--map", metavar="CLASS", help="write a map of this class or parent, one value per label tile")
    parser.add_argument("--out", type=Path, metavar="PNG", help="where to write the map (default: CLASS.png)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def labels(args: argparse.Namespace) -> None:
    """Print what an archive shows, class by class."""
    opened = _open(args)
    if args.map:
        out = args.out or Path(f"{args.map}.png")
        _map(opened, args.map).save(out)
        print(json.dumps({"map": args.map, "out": str(out)}) if args.json else f"{args.map}: {out}")
        return
    summary = opened.summary()
    if args.json:
        print(json.dumps(summary))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("class", "chunks", "of all", "stands for", title=_counts(summary), title_justify="left")
    for name, count in summary["classes"].items():
        members = [opened.vocabulary.names[i] for i in opened.vocabulary.members(name)]
        stands = " | ".join(members) if members != [name] else ""
        table.add_row(name, f"{count:,}", f"{count / max(1, summary['chunks']):.1%}", stands)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def query_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic query`."""
    _source(parser)
    parser.add_argument("expression", help="for instance 'Forest > 0.6 & ~Water'")
    parser.add_argument("--tiles", action="store_true", help="regions of the label tiles instead of the chunks")
    parser.add_argument("--json", action="store_true", help="print every match as a line of JSON")
    text = "what to compare with the chunks' headers: what is exported, everything, or nothing (default: fetched)"
    parser.add_argument("--verify", choices=("fetched", "all", "none"), default="fetched", help=text)
    parser.add_argument("--export", type=Path, metavar="DIR", help="decode what matches and write it there as images")
    parser.add_argument("--as", dest="kind", choices=("png", "tiff"), default="png", help="of these (default: png)")


def query(args: argparse.Namespace) -> None:
    """Print the chunks that satisfy an expression."""
    from deepsic_codec.errors import ExpressionError

    opened = _open(args)
    verify = None if args.verify == "none" else args.verify
    try:
        found = opened.where(args.expression, tiles=args.tiles, verify=verify)
    except ExpressionError as error:
        # Here and not in `main`, which prints one line: the second and third line point to the place.
        print(f"deepsic query: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if args.json:
        for chunk, region in _matches(found, args.tiles):
            print(json.dumps({"chunk": chunk, "region": [[part.start, part.stop] for part in region]}))
    else:
        _table(found, args.tiles)
    if args.export is not None:
        args.export.mkdir(parents=True, exist_ok=True)
        written = sum(_export(match, opened, args.export, args.kind) for match in found.iter_arrays())
        print(f"{written} images: {args.export}", file=sys.stderr)


def index_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic index`."""
    parser.add_argument("url", metavar="URL", help="path or URL of the array, or of a group with arrays")
    parser.add_argument("--name", help="the one array in the group")
    parser.add_argument("--index", metavar="URL", help="where the index goes, if not beside the array")
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def index(args: argparse.Namespace) -> None:
    """Write or refresh the label index."""
    from deepsic_codec.labels.index_writer import consolidate_labels

    with progress_bar("reading headers") as progress:
        made = consolidate_labels(args.url, args.name, index=args.index, progress=progress)
    indices = list(made.values()) if isinstance(made, dict) else [made]
    if args.json:
        print(
            json.dumps(
                [
                    {
                        "array": str(one.array.store_path),
                        "index": str(one.index.place),
                        "chunks": one.geometry.count,
                        **one.index.counts,
                    }
                    for one in indices
                ]
            )
        )
        return
    for opened in indices:
        print(f"{opened.index.place}: {_counts({'chunks': opened.geometry.count, **opened.index.counts})}")


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="path or URL of the array, or of a group that has it")
    parser.add_argument("--name", help="which array, if the group has more than one")
    parser.add_argument("--index", metavar="URL", help="where the index is, if not beside the array")
    parser.add_argument("--scan", action="store_true", help="read the headers of all chunks instead of an index")


def _open(args: argparse.Namespace) -> Labels:
    from deepsic_codec.labels.query import open_labels

    return open_labels(args.url, args.name, index=args.index, scan=args.scan)


def _counts(summary: dict[str, Any]) -> str:
    kinds = {
        "header": "labelled in their headers",
        "features": "from features",
        "unlabelled": "without labels",
        "missing": "without data",
    }
    parts = [f"{summary[kind]:,} {text}" for kind, text in kinds.items() if summary.get(kind)]
    return f"{summary['chunks']:,} chunks: {', '.join(parts) or 'none'}"


def _matches(found: Selection, tiles: bool) -> list[tuple[list[int], Any]]:
    if not tiles:
        return [(list(chunk), region) for chunk, region in zip(found.chunks, found.regions, strict=True)]
    per_chunk = found.labels.geometry.per_chunk
    chunks = (found.tiles // per_chunk).tolist()
    return list(zip(chunks, found.regions, strict=True))


def _table(found: Selection, tiles: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    matches = _matches(found, tiles)
    table = Table("chunk", "region")
    for chunk, region in matches[:ROWS]:
        table.add_row(".".join(map(str, chunk)), ", ".join(f"{part.start}:{part.stop}" for part in region))
    if matches:
        Console(width=None if sys.stdout.isatty() else 110).print(table)
    if len(matches) > ROWS:
        print(f"and {len(matches) - ROWS:,} more (--json prints all)")
    total = found.labels.bytes_read + found.bytes_read
    requests = found.labels.requests + found.requests
    read = f"read {total:,} bytes in {requests} requests, decoded nothing"
    print(f"{found.count:,} of {found.mask.size:,} chunks; {read}")


def _map(opened: Labels, name: str) -> Any:
    """Picture of the scores of a class: black 0, white 1, transparent where there is no label."""
    import numpy as np
    from PIL import Image

    geometry = opened.geometry
    scores = opened.map(name)
    axes = [axis for axis in geometry.axes if axis != "c" or scores.ndim == len(geometry.axes)]
    scores = np.moveaxis(scores, [axes.index("y"), axes.index("x")], [-2, -1])
    scores = scores.reshape(-1, scores.shape[-1])  # slices below each other
    known = ~np.isnan(scores)
    grey = np.round(np.where(known, scores, 0) * 255).astype(np.uint8)
    image = Image.fromarray(np.stack([grey, known.astype(np.uint8) * 255], -1), "LA")
    scale = max(1, MAP_EDGE // max(1, *image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _export(match: Match, opened: Labels, folder: Path, kind: str) -> int:
    """Write a chunk as images, one for each slice; returns how many."""
    import numpy as np
    from PIL import Image

    axes = opened.geometry.axes
    slices = [axis for axis in axes if axis not in "yxc"]
    order = [*slices, "y", "x", *("c" if "c" in axes else "")]
    pixels: NDArray[np.uint8] = match.array.transpose([axes.index(axis) for axis in order])
    shape = pixels.shape[len(slices) :]
    name = "_".join([opened.array.basename or "chunk", *map(str, match.chunk)])
    images = pixels.reshape(-1, *shape)
    for number, image in enumerate(images):
        part = f"_{number}" if slices else ""
        image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{name}{part}.{kind}")
    return len(images)
