"""The commands `labels`, `query` and `index`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsic_codec.cli.console import progress_bar, say, say_json, say_table
from deepsic_codec.cli.options import add_array, add_json, axis_part, chunk_position
from deepsic_codec.errors import ConfigurationError, StaleIndex, counted

if TYPE_CHECKING:
    from PIL import Image as PillowImage

    from deepsic_codec.labels.query import Labels
    from deepsic_codec.labels.selection import Match, Selection

MAP_EDGE = 512  # pixels: a map is enlarged to about this size
MAX_ROWS = 20  # of the table that `query` prints; classes in no chunk are left out of longer ones
KINDS = {  # keys of a summary of chunks
    "header": "labelled in their headers",
    "features": "from features",
    "unlabelled": "without labels",
    "missing": "without data",
}


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic labels`."""
    add_array(parser, scan=True)
    parser.add_argument("--map", metavar="CLASS", help="write a map of this class or parent, one value per label tile")
    parser.add_argument("-o", "--out", type=Path, metavar="PNG", help="file of the map (default: CLASS.png)")
    parser.add_argument("--areas", action="store_true", help="print the area that each class covers, in hectares")
    parser.add_argument("--verify", action="store_true", help="compare the index with all chunks first")
    add_json(parser)


def run_labels(args: argparse.Namespace) -> None:
    """Print the classes in an archive, or write a map of one."""
    from deepsic_codec.labels.selection import NOT_COMPARED

    labels = _open(args)
    if args.verify:
        count = int(labels.rewritten().sum())
        if count:
            raise StaleIndex(f"{counted(count, 'chunk')} written again since the index was made; run deepsic index")
    elif not labels.compared:
        say(f"{NOT_COMPARED}; --verify does that", error=True)
    if args.map:
        out = args.out or Path(f"{args.map}.png")
        _map(labels, args.map).save(out)
        if args.json:
            say_json({"map": args.map, "out": str(out)})
        else:
            say(f"{args.map}: {out}")
        return
    summary = labels.summary()
    if args.areas:
        from deepsic_codec.io.places import areas

        summary["hectares"] = {name: values.tolist() for name, values in areas(labels).items()}
    if args.json:
        say_json(summary)
        return
    say(_counts(summary))
    classes = summary["classes"]
    absent = [name for name, count in classes.items() if not count] if len(classes) > MAX_ROWS else []
    rows = []
    for name, count in classes.items():
        if name in absent:
            continue
        stands_for = " | ".join(labels.vocabulary.parents.get(name, ()))
        hectares = [_hectares(summary["hectares"][name])] if args.areas else []
        rows.append([name, f"{count:,}", f"{count / max(1, summary['chunks']):.1%}", *hectares, stands_for])
    columns = ["class", "chunks", "of all", *(["hectares"] if args.areas else []), "stands for"]
    say_table(columns, rows, left=["stands for"])
    if absent:
        say(f"and {counted(len(absent), 'class', 'classes')} in no chunk (--json prints all)")


def add_query(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic query`."""
    add_array(parser, scan=True)
    parser.add_argument("expression", help="for example 'Forest > 0.6 & ~Water'")
    parser.add_argument("--tiles", action="store_true", help="regions of the label tiles instead of the chunks")
    parser.add_argument("--json", action="store_true", help="print each match as a line of JSON")
    text = "which index entries to compare with the chunks: those of exported chunks, all, or none (default: fetched)"
    parser.add_argument("--verify", choices=("fetched", "all", "none"), default="fetched", help=text)
    parser.add_argument(
        "-o", "--export", type=Path, metavar="DIR", help="decode the matches and write them as images to this folder"
    )
    parser.add_argument("--as", dest="kind", choices=("png", "tiff"), default="png", help="image format (default: png)")
    add_tables(parser)


def run_query(args: argparse.Namespace) -> None:
    """Print the chunks that satisfy an expression."""
    from deepsic_codec.labels.selection import NOT_COMPARED

    labels = _open(args)
    verify = None if args.verify == "none" else args.verify
    selection = labels.where(args.expression, tiles=args.tiles, verify=verify)
    matches = _matches(selection, args.tiles)
    if args.json:
        for chunk, region in matches:
            say_json({"chunk": chunk, "region": [[part.start, part.stop] for part in region]})
    else:
        rows = [[_dotted(chunk), ", ".join(f"{p.start}:{p.stop}" for p in region)] for chunk, region in matches]
        if rows:
            say_table(["chunk", "region"], rows[:MAX_ROWS], left=["region"])
        if len(rows) > MAX_ROWS:
            say(f"and {len(rows) - MAX_ROWS:,} more (--json prints all)")
        nbytes = labels.bytes_read + selection.bytes_read
        requests = labels.requests + selection.requests
        say(
            f"{selection.count:,} of {counted(selection.mask.size, 'chunk')}; "
            f"read {nbytes:,} bytes in {counted(requests, 'request')}, decoded nothing"
        )
    if not selection.compared:
        say(f"{NOT_COMPARED}; --verify all does that", error=True)
    if args.export is not None:
        args.export.mkdir(parents=True, exist_ok=True)
        written = sum(_export(match, labels, args.export, args.kind) for match in selection.iter_arrays())
        say(f"{counted(written, 'image')}: {args.export}", error=True)
    write_tables(args, selection)


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic changes`."""
    add_array(parser, scan=True)
    parser.add_argument("before", help="expression that holds at the earlier date, for example Forest")
    parser.add_argument("after", help="expression that holds at the later date, for example '~Forest & ~unknown'")
    text = (
        "compare these two dates, beginnings in ISO 8601 or positions along axis t (default: each with the one before)"
    )
    parser.add_argument("--between", nargs=2, type=_date, metavar=("FIRST", "LAST"), help=text)
    parser.add_argument("--json", action="store_true", help="print each tile as a line of JSON")
    add_tables(parser)


def run_changes(args: argparse.Namespace) -> None:
    """Print the label tiles that showed one thing and then another."""
    labels = _open(args)
    selection = labels.changes(args.before, args.after, between=args.between and tuple(args.between))
    _say_tiles(args, labels, selection)
    write_tables(args, selection)


def _date(text: str) -> int | str:
    """Parse a position along axis t (up to three digits), or the beginning of a date; a type of arguments."""
    return int(text) if text.removeprefix("-").isdecimal() and len(text.removeprefix("-")) < 4 else text


def _say_tiles(args: argparse.Namespace, labels: "Labels", selection: "Selection") -> None:
    """Print the tiles of a selection with what led to it."""
    details = {name: values.tolist() for name, values in selection.details.items()}
    table = selection.to_table()
    if "date" in table:
        details = {"date": table["date"].astype(str).tolist()} | details
    if "date_before" in details:
        details["date_before"] = selection.details["date_before"].astype(str).tolist()
    matches = _matches(selection, True)
    if args.json:
        for number, (chunk, region) in enumerate(matches):
            more = {name: values[number] for name, values in details.items()}
            say_json({"chunk": chunk, "region": [[part.start, part.stop] for part in region], **more})
    else:
        rows = [
            [_dotted(chunk), ", ".join(f"{p.start}:{p.stop}" for p in region), *(_cell(v[n]) for v in details.values())]
            for n, (chunk, region) in enumerate(matches[:MAX_ROWS])
        ]
        if rows:
            say_table(["chunk", "region", *details], rows, left=["region"])
        if len(matches) > MAX_ROWS:
            say(f"and {len(matches) - MAX_ROWS:,} more (--json prints all)")
        nbytes, requests = labels.bytes_read + selection.bytes_read, labels.requests + selection.requests
        say(
            f"{counted(len(matches), 'tile')} in {counted(selection.count, 'chunk')}; "
            f"read {nbytes:,} bytes in {counted(requests, 'request')}, decoded nothing"
        )


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def add_similar(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic similar`."""
    add_array(parser, scan=True)
    example = parser.add_mutually_exclusive_group(required=True)
    text = "position of a chunk, such as 0.3.0, as deepsic query prints it"
    example.add_argument("--chunk", type=chunk_position, metavar="CHUNK", help=text)
    text = "part of the array, such as y=0:64 x=128:192; all of the axes that are not named"
    example.add_argument("--region", nargs="+", type=axis_part, metavar="AXIS=A:B", help=text)
    example.add_argument("--image", metavar="FILE", help="a picture that is in no archive")
    parser.add_argument("-k", type=int, default=20, help="maximum number of label tiles (default: 20)")
    parser.add_argument("--where", metavar="EXPRESSION", help="only tiles that satisfy it")
    text = "compute embeddings of chunks that store none, from features or pixels"
    parser.add_argument("--compute", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print each tile as a line of JSON")
    add_tables(parser)


def run_similar(args: argparse.Namespace) -> None:
    """Print the label tiles that look like an example."""
    labels = _open(args)
    to: Any = args.chunk
    if args.region is not None:
        from deepsic_codec.io.region import to_region

        to = to_region(labels.array, labels.geometry.axes, dict(args.region))
    elif args.image is not None:
        from deepsic_codec.io.images import read_rgb

        to = read_rgb(args.image)
    selection = labels.similar(to, args.k, where=args.where, compute=args.compute)
    _say_tiles(args, labels, selection)
    write_tables(args, selection)


def add_learn(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic learn`."""
    add_array(parser)
    parser.add_argument("label", metavar="NAME", help="name of the label in expressions")
    text = "examples: chunks such as 0.3.0, regions such as y=0:64,x=128:192, or picture files"
    parser.add_argument("--like", nargs="+", default=[], metavar="EXAMPLE", help=text)
    parser.add_argument("--unlike", nargs="+", default=[], metavar="EXAMPLE", help="examples of what it is not")
    text = "distance of tiles of a chunk that count for one, along y and x (default: 0, 1 or 2, as examples bear out)"
    parser.add_argument("--around", type=int, metavar="TILES", help=text)
    parser.add_argument("--forget", action="store_true", help="take the label out of the index")
    add_json(parser)


def run_learn(args: argparse.Namespace) -> None:
    """Learn a label from examples."""
    from deepsic_codec.labels.open import open_labels

    labels = open_labels(args.url, args.name, index=args.index, mode="r+")
    if args.forget:
        labels.forget(args.label)
        say(f"{args.label}: forgotten")
        return
    like, unlike = ([_example(labels, text) for text in part] for part in (args.like, args.unlike))
    label = labels.learn(args.label, like, unlike, around=args.around)
    if args.json:
        document = {key: getattr(label, key) for key in ("name", "around", "precision", "recall", "like", "unlike")}
        say_json(document | {"chunks": labels.where(f"{_quoted(args.label)}").count})
        return
    around = f"by tiles up to {label.around} away; " if label.around else ""
    precision = "none above 0.5" if label.precision is None else f"precision {label.precision:.2f}"
    say(
        f"{label.name}: {counted(label.like, 'example')}, {label.unlike} of what it is not; "
        f"cross-validated {precision}, recall {label.recall or 0:.2f}; "
        f"{around}in {counted(labels.where(_quoted(args.label)).count, 'chunk')}"
    )


def add_suggest(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic suggest`."""
    add_array(parser)
    parser.add_argument("label", metavar="NAME", help="a learned label")
    parser.add_argument("-k", type=int, default=20, help="maximum number of label tiles (default: 20)")
    parser.add_argument("--where", metavar="EXPRESSION", help="only tiles that satisfy it")
    parser.add_argument("--json", action="store_true", help="print each tile as a line of JSON")
    add_tables(parser)


def run_suggest(args: argparse.Namespace) -> None:
    """Print the label tiles of which a learned label is least sure."""
    from deepsic_codec.labels.open import open_labels

    labels = open_labels(args.url, args.name, index=args.index)
    selection = labels.suggest(args.label, args.k, where=args.where)
    _say_tiles(args, labels, selection)
    write_tables(args, selection)


def _quoted(name: str) -> str:
    """Return a name as an expression."""
    return f"'{name}'" if '"' in name else f'"{name}"'


def _example(labels: "Labels", text: str) -> Any:
    """Return an example from the command line: a chunk, a region, or the pixels of a picture file."""
    if all(part.isdecimal() for part in text.split(".")):
        return chunk_position(text)
    if "=" in text and not Path(text).exists():
        from deepsic_codec.io.region import to_region

        try:
            parts = dict(axis_part(part) for part in text.split(","))
        except argparse.ArgumentTypeError as error:
            raise ConfigurationError(f"{text}: {error}") from None
        return to_region(labels.array, labels.geometry.axes, parts)
    from deepsic_codec.io.images import read_rgb

    return read_rgb(text)


def add_tables(parser: argparse.ArgumentParser) -> None:
    """Declare the options that write the regions of a selection to files."""
    text = "write the matches as polygons in longitude and latitude, with scores, chunk and date"
    parser.add_argument("--geojson", type=Path, metavar="FILE", help=text)
    parser.add_argument("--geoparquet", type=Path, metavar="FILE", help="the same as GeoParquet")
    text = "write a STAC item with the label extension for the file of --geojson or --geoparquet"
    parser.add_argument("--stac", type=Path, metavar="FILE", help=text)
    text = "when the imagery was taken, for --stac, if the array has no coordinate of times (such as 2024-06-30)"
    parser.add_argument("--time", metavar="ISO8601", help=text)
    parser.add_argument("--mosaic", type=Path, metavar="PNG", help="draw thumbnails of the first 24 matches")


def write_tables(args: argparse.Namespace, selection: "Selection") -> None:
    """Write the regions of a selection to the files that the options name."""
    if args.stac is not None and args.geojson is None and args.geoparquet is None:
        raise ConfigurationError("stac: the item describes a file; pass --geojson or --geoparquet, too")
    if args.mosaic is not None:
        from deepsic_codec.io.mosaic import mosaic

        mosaic(selection).save(args.mosaic)
        say(f"thumbnails: {args.mosaic}", error=True)
    if args.geojson is args.geoparquet is None:
        return
    from deepsic_codec.io import places

    if args.geojson is not None:
        places.write_geojson(selection, args.geojson)
        say(f"{counted(len(selection.cells), 'polygon')}: {args.geojson}", error=True)
    if args.geoparquet is not None:
        places.write_geoparquet(selection, args.geoparquet)
        say(f"{counted(len(selection.cells), 'polygon')}: {args.geoparquet}", error=True)
    if args.stac is not None:
        file = args.geojson or args.geoparquet
        item = places.stac_item(selection, file.name, time=args.time)
        args.stac.write_text(json.dumps(item, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        say(f"STAC item: {args.stac}", error=True)


def add_index(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic index`."""
    parser.add_argument("url", metavar="URL", help="path or URL of the array, or of a group with arrays")
    parser.add_argument("--name", help="the one array in the group")
    parser.add_argument("--index", metavar="URL", help="location of the index, if not beside the array")
    text = "compute labels and embeddings anew from features, with another head or, without HEAD, that of the array"
    parser.add_argument("--relabel", nargs="?", const="", metavar="HEAD", help=text)
    add_json(parser)


def run_index(args: argparse.Namespace) -> None:
    """Write or refresh the label index."""
    from deepsic_codec.labels.consolidate import consolidate_labels
    from deepsic_codec.labels.relabel import relabel
    from deepsic_codec.stored.location import url_of

    made: Any
    if args.relabel is not None:
        with progress_bar("computing labels") as progress:
            made = relabel(args.url, args.relabel or None, args.name, index=args.index, progress=progress)
    else:
        with progress_bar("reading headers") as progress:
            made = consolidate_labels(args.url, args.name, index=args.index, progress=progress)
    documents = [
        {
            "array": url_of(labels.array.store_path),
            "index": str(labels.index.location),
            "chunks": labels.geometry.count,
            **labels.index.counts,
        }
        for labels in (made.values() if isinstance(made, dict) else [made])
    ]
    if args.json:
        say_json(documents)
        return
    for document in documents:
        say(f"{document['index']}: {_counts(document)}")


def _open(args: argparse.Namespace) -> "Labels":
    from deepsic_codec.labels.open import open_labels

    if not args.scan:
        return open_labels(args.url, args.name, index=args.index)
    with progress_bar("reading headers") as progress:
        return open_labels(args.url, args.name, index=args.index, scan=True, progress=progress)


def _hectares(values: Any) -> str:
    """Return an area as text; those of several slices are separated by blanks."""
    return " ".join(map(_hectares, values)) if isinstance(values, list) else f"{values:,.1f}"


def _counts(summary: dict[str, Any]) -> str:
    parts = [f"{summary[kind]:,} {text}" for kind, text in KINDS.items() if summary.get(kind)]
    return f"{counted(summary['chunks'], 'chunk')}: {', '.join(parts) or 'none'}"


def _matches(selection: "Selection", tiles: bool) -> list[tuple[list[int], Any]]:
    """Return chunk and region of each match."""
    if not tiles:
        return [(list(chunk), region) for chunk, region in zip(selection.chunks, selection.regions, strict=True)]
    chunks = (selection.tiles // selection.geometry.per_chunk).tolist()
    return list(zip(chunks, selection.regions, strict=True))


def _dotted(chunk: list[int]) -> str:
    return ".".join(map(str, chunk))


def _map(labels: "Labels", name: str) -> "PillowImage.Image":
    """Draw the scores of a class: black for 0, white for 1, transparent without labels."""
    import numpy as np

    from deepsic_codec.require import require

    require("cli", "PIL")
    from PIL import Image

    axes = [axis for axis in labels.geometry.axes if axis != "c"]
    scores = labels.map(name)
    if scores.ndim > len(axes):
        axes = list(labels.geometry.axes)
    scores = np.moveaxis(scores, [axes.index("y"), axes.index("x")], [-2, -1])
    scores = scores.reshape(-1, scores.shape[-1])  # slices below each other
    labelled = ~np.isnan(scores)
    grey = np.round(np.where(labelled, scores, 0) * 255).astype(np.uint8)
    image = Image.fromarray(np.stack([grey, labelled.astype(np.uint8) * 255], -1), "LA")
    scale = max(1, MAP_EDGE // max(1, *image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _export(match: "Match", labels: "Labels", folder: Path, kind: str) -> int:
    """Write a chunk as images, one for each slice; returns their number."""
    from deepsic_codec.io.export import image_attributes, write_image

    axes = labels.geometry.axes
    images = axes.to_samples(match.array)
    name = "_".join([labels.array.basename or "chunk", *map(str, match.chunk)])
    attributes = image_attributes(labels.stored, match.region) if kind == "tiff" else {}
    for number, image in enumerate(images):
        part = f"_{number}" if axes.slice_axes else ""
        write_image(folder / f"{name}{part}.{kind}", image, kind, attributes)
    return len(images)
