"""The subcommands `info`, `preview`, `compare` and `export`: arguments, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsic_codec.cli.console import progress_bar
from deepsic_codec.cli.encoder_options import add_encoder_options, encoder_options

if TYPE_CHECKING:
    from rich.console import Console

    from deepsic_codec.io.compare import Outcome

CLASSES = 12  # of a list of labels
PLAIN = 120  # columns where there is no terminal


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PLAIN, highlight=False)


def _array(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="path or URL of the array, or of a group that has it")
    parser.add_argument("--name", help="which array, if the group has more than one")
    parser.add_argument("--index", metavar="URL", help="where the label index is, if not beside the array")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def _part(text: str) -> str:
    from deepsic_codec.io.region import parse_parts

    try:
        parse_parts([text])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _parts(texts: Sequence[str] | None) -> dict[str, slice | int]:
    from deepsic_codec.errors import ConfigurationError
    from deepsic_codec.io.region import parse_parts

    try:
        return parse_parts(texts or [])
    except ValueError as error:  # an axis twice
        raise ConfigurationError(str(error)) from None


def info_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic info`."""
    parser.add_argument("url", metavar="URL", help="path or URL of an array or group of Zarr")
    parser.add_argument("--name", help="one array in the group")
    parser.add_argument("--index", metavar="URL", help="where the label index is, if not beside the array")
    parser.add_argument("--all", action="store_true", help="read the headers of all chunks, not of a sample")
    _json(parser)


def info(args: argparse.Namespace) -> None:
    """Print what is in an archive."""
    from deepsic_codec.io.info import describe

    found = describe(args.url, args.name, index=args.index, everything=args.all)
    if args.json:
        print(json.dumps(found))
        return
    console = _console()
    arrays = [found] if found["kind"] == "array" else [*found["arrays"], *found["others"]]
    if found["kind"] == "group":
        counts = {
            "arrays": "arrays stored with DeepSIC",
            "others": "other arrays",
            "label_indices": "label indices",
            "embedded_models": "embedded models",
        }
        kinds = ", ".join(f"{what}: {len(found[key])}" for key, what in counts.items() if found[key] or key == "arrays")
        _say(console, f"{found['store']}: group, Zarr format {found['zarr_format']}; {kinds}\n")
    for one in arrays:
        _describe(console, one)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes)) or "scalar"


def _describe(console: Console, one: Mapping[str, Any]) -> None:
    """Print names and what they are in two columns: no table, which would fill its lines up with blanks."""
    import textwrap

    rows = _rows(one) if "codec_parameters" in one else _plain_rows(one)
    _say(console, str(one["store"]))
    for key, text in rows.items():
        first, *more = textwrap.wrap(text, max(40, console.width - 18), break_on_hyphens=False) or [""]
        _say(console, f"  {key:<16}{first}")
        for line in more:
            _say(console, f"{'':18}{line}")
    _say(console, "")


def _plain_rows(one: Mapping[str, Any]) -> dict[str, str]:
    return {
        "array": f"{_times(one['shape'])} {one['dtype']}",
        "chunks": _times(one["chunk_shape"]),
        "Zarr format": str(one["zarr_format"]),
        "codec": f"{one['codec']} (not DeepSIC)",
    }


def _rows(one: Mapping[str, Any]) -> dict[str, str]:
    chunks, size, model, parameters = one["chunks"], one["size"], one["model"], one["codec_parameters"]
    about = "" if one["exact"] else "about "
    rows = {
        "array": f"{_times(one['shape'])} ({', '.join(one['dimension_names'])}) {one['dtype']}, "
        f"fill {one['fill_value']}",
        "chunks": f"{_times(one['chunk_shape'])}"
        + (f" in shards of {_times(one['shard_shape'])}" if one["shard_shape"] else "")
        + f"; {about}{chunks['stored']:,} of {chunks['total']:,} stored, {about}{chunks['missing']:,} missing",
        "Zarr format": str(one["zarr_format"]),
        "codec": "deepsic, " + ", ".join(f"{k} {_short(v)}" for k, v in parameters.items() if _told(k, v)),
        "model": f"{model['name']}, decoder {model['decoder'][:16]}, head {(model['head'] or 'none')[:16]}; "
        f"{_where(model)}",
    }
    rows |= _written_by(one)
    if size["bytes"]:
        rows["size"] = (
            f"{about}{size['bytes']:,} bytes for {size['array_bytes']:,}; {size['bpp']:.3f} bits per pixel, "
            f"{size['bits_per_sample']:.3f} per sample, ratio {size['ratio']:.1f}"
        )
    if size.get("parts"):
        rows["of that"] = ", ".join(f"{name} {part:.1%}" for name, part in size["parts"].items())
    rows["error"] = _error(one["error"], one["dtype"])
    rows["labels"] = _labels(one["labels"], one["label_tile"])
    if not one["exact"]:
        rows["sampled"] = f"{chunks['headers_read']:,} of {chunks['total']:,} headers; --all reads all"
    rows["read for this"] = f"{one['read']['bytes']:,} bytes in {one['read']['requests']:,} requests, nothing decoded"
    return rows


def _told(key: str, value: Any) -> bool:
    return key not in ("model", "decoder", "head", "axes") and value not in (None, {}, [])


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _where(model: Mapping[str, Any]) -> str:
    if not model["here"]:
        if model["embedded"]:
            return "in the archive"
        return "not here: pixels cannot be decoded (DEEPSIC_MODEL_PATH names the folder that has it)"
    beside = ", and in the archive" if model["embedded"] else ""
    return ("here" if model["head_here"] else "here, with another head") + beside


def _written_by(one: Mapping[str, Any]) -> dict[str, str]:
    """Say who wrote the chunks if that is not what metadata says alone."""
    writers, parameters = one["written_by"], one["codec_parameters"]
    formats = sorted({writer["payload_format"] for writer in writers})
    rows = {"payload format": ", ".join(map(str, formats))} if formats else {}
    metadata = parameters["decoder"], parameters.get("quality")
    decoders = {w["decoder"] for w in writers}
    if len(writers) > 1 and metadata[1] is None and decoders == {metadata[0][:16]}:
        qualities = [w["quality"] for w in writers]
        rows["written with"] = f"qualities from {min(qualities):g} to {max(qualities):g}, chosen chunk by chunk"
    elif any((w["decoder"] != metadata[0][:16] or w["quality"] != metadata[1]) for w in writers):
        parts = [f"quality {w['quality']:g}, decoder {w['decoder']}: {w['chunks']:,} chunks" for w in writers[:8]]
        rows["written with"] = "; ".join(parts) + (f"; and {len(writers) - 8} more" if len(writers) > 8 else "")
    return rows


def _error(error: Mapping[str, Any], dtype: str) -> str:
    if error["max_error"] is not None:
        bound = error["max_error"]
        return "none: lossless" if bound == 0 else f"at most {bound:g} in every sample"
    if error["step"] is None:
        return "unknown: no chunk was read"
    text = f"quantiser step {error['step']:.3g} grey levels, about {error['rms']:.2g} RMS"
    text += "" if error.get("psnr") else " where there is detail at it"
    if error["step_data"] is None:
        return text + "; units of the data per grey level differ from chunk to chunk"
    if dtype == "uint8" and error["unit"] == 1:
        return text
    return text + f"; in units of the data {_numbers(error['step_data'])} and {_numbers(error['rms_data'])}"


def _numbers(values: Any) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})" if isinstance(values, list) else f"{values:.4g}"


def _labels(labels: Mapping[str, Any], tile: Sequence[int]) -> str:
    if labels["from"] is None:
        return labels["note"]
    ranked = sorted(((count, name) for name, count in labels["classes"].items() if count), reverse=True)
    shown = ", ".join(f"{name} {count:,}" for count, name in ranked[:CLASSES]) or "none that scores 0.5"
    more = f" and {len(ranked) - CLASSES} more" if len(ranked) > CLASSES else ""
    note = labels.get("note", "")
    note = f" ({note})" if note else ""
    source = "index" if labels["from"] == "index" else f"headers{note}"
    return f"chunks of {labels['of_chunks']:,} that show a class, by {source}, tiles {_times(tile)}: {shown}{more}"


def preview_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic preview`."""
    _array(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("preview.png"), metavar="PNG", help="the picture (default: preview.png)")
    add("--size", type=int, default=1024, metavar="PIXELS", help="longer edge of the image (default: 1024)")
    text = "a second image with the best label of each tile (default: yes, unless there is --where)"
    add("--labels", action=argparse.BooleanOptionalAction, default=None, help=text)
    add("--where", metavar="EXPR", help="dim all that does not satisfy this, such as 'River > 0.6'")
    text = "position along other axes, such as t=3 (default: 0)"
    add("--select", nargs="+", type=_part, metavar="AXIS=N", help=text)
    add("--bands", type=_bands, metavar="R,G,B", help="which bands to show, one or three (default: the first)")
    text = "scale values between their percentiles (default: for all but uint8 of 1 or 3 bands)"
    add("--stretch", action=argparse.BooleanOptionalAction, default=None, help=text)
    add("--all", action="store_true", help="decode all chunks, however many there are")
    _json(parser)


def _bands(text: str) -> list[int]:
    try:
        bands = [int(number) for number in text.split(",")]
    except ValueError:
        bands = []
    if len(bands) not in (1, 3):
        raise argparse.ArgumentTypeError(f"expected one or three numbers such as 3,2,1, got {text!r}")
    return bands


def preview(args: argparse.Namespace) -> None:
    """Write a small picture of an array."""
    from deepsic_codec.io.preview import preview as draw

    with progress_bar("decoding") as progress:
        made = draw(
            args.url,
            args.name,
            size=args.size,
            labels=args.labels,
            where=args.where,
            select=_parts(args.select),
            bands=args.bands,
            stretch=args.stretch,
            everything=args.all,
            index=args.index,
            progress=progress,
        )
    made.image.save(args.out)
    if args.json:
        about = {"out": str(args.out), "chunks": made.chunks, "decoded": made.shown, "sampled": made.sampled}
        print(json.dumps({**about, "tiles": made.classes, "stretch": made.limits}))
        return
    sampled = "; each stands for those around it" if made.sampled else ""
    _say(_console(), f"{args.out}: {made.shown:,} of {made.chunks:,} chunks decoded{sampled}")


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic compare`."""
    from deepsic_codec.io.compare import CHUNK, DEFAULT
    from deepsic_codec.io.peers import PEERS

    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files (16 bits are stretched to 8)")
    text = "folder for <image>.png and curve.png (default: deepsic-compare)"
    add("--out", type=Path, default=Path("deepsic-compare"), metavar="DIR", help=text)
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--quality", type=_quality, default=50.0, help="of DeepSIC, 1 to 100 (default: 50)")
    rate.add_argument("--bpp", type=_positive, help="bits per pixel for all, instead of a quality")
    text = f"what to compare with (default: {', '.join(DEFAULT)})"
    add("--codecs", nargs="+", choices=list(PEERS), default=list(DEFAULT), metavar="CODEC", help=text)
    add("--model", default="base", help="name of a model of DeepSIC (default: base)")
    add("--chunk", type=int, default=CHUNK, metavar="PIXELS", help=f"largest edge of its chunks (default: {CHUNK})")
    add_encoder_options(parser)
    add("--crop", type=_bands_two, metavar="X,Y", help="left top corner of the enlarged part (default: the busiest)")
    add("--curve", action=argparse.BooleanOptionalAction, default=True, help="measure and plot a curve (default: yes)")
    _json(parser)


def _quality(text: str) -> float:
    return _number(text, 1, 100, "a number from 1 to 100")


def _positive(text: str) -> float:
    return _number(text, 0.001, 1000, "bits per pixel, such as 0.5")


def _number(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return value


def _bands_two(text: str) -> tuple[int, int]:
    try:
        x, y = (int(number) for number in text.split(","))
    except ValueError:
        x = -1
    if x < 0 or y < 0:
        raise argparse.ArgumentTypeError(f"expected two numbers such as 640,256, got {text!r}")
    return x, y


def compare(args: argparse.Namespace) -> None:
    """Print and draw what DeepSIC and other codecs make of images at equal bytes."""
    from deepsic_codec.io import compare as comparing
    from deepsic_codec.io.peers import require

    comparing.check_codecs(args.codecs)
    if args.curve:
        require("matplotlib")
    images = [(path.name, comparing.read_image(path)) for path in args.images]
    ours = comparing.Ours(args.model, args.chunk, **encoder_options(args))
    args.out.mkdir(parents=True, exist_ok=True)
    console = _console()
    outcomes: list[Outcome] = []
    files: list[Path] = []
    with _steps() as say:
        options = {"codecs": args.codecs, "ours": ours, "progress": say}
        for name, original, results in comparing.at_equal_bytes(images, quality=args.quality, bpp=args.bpp, **options):
            outcomes += [outcome for outcome, _ in results]
            crop = None if args.crop is None else (args.crop[1], args.crop[0])
            files.append(_unused(args.out / f"{Path(name).stem}.png", files))
            comparing.picture(name, original, results, crop).save(files[-1])
        curves = comparing.curves(images, **options) if args.curve else {}
        if curves:
            files.append(_unused(args.out / "curve.png", files))
            comparing.plot(files[-1], curves, images[0][0] if len(images) == 1 else f"mean of {len(images)} images")
    if args.json:
        parts = {codec: [row.to_json() for row in rows] for codec, rows in curves.items()}
        report = {"images": [one.to_json() for one in outcomes], "curves": parts, "files": list(map(str, files))}
        print(json.dumps(report))
        return
    for name, _ in images:
        _say(console, name)
        console.print(_outcomes([one for one in outcomes if one.image == name]))
    if len(images) > 1:
        _say(console, f"mean of {len(images)} images")
        console.print(_outcomes(comparing.means(outcomes)))
    _say(console, "Times are of one image on this machine, a first call not counted; peers use one thread.")
    for file in files:
        _say(console, f"wrote {file}")


def _unused(path: Path, files: Sequence[Path]) -> Path:
    """Number a file where another image of this run has its name already."""
    number, first = 2, path
    while path in files:
        path, number = first.with_name(f"{first.stem}-{number}{first.suffix}"), number + 1
    return path


@contextmanager
def _steps() -> Iterator[Any]:
    """Show what is being done on standard error; gives a function of a text."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with _console(stderr=True).status("") as status:
        yield status.update


def _outcomes(outcomes: Sequence[Outcome]) -> Any:
    import numpy as np
    from rich.table import Table

    table = Table("codec")
    for column in ("setting", "bytes", "bpp", "PSNR dB", "MS-SSIM", "encode s", "decode s"):
        table.add_column(column, justify="right")
    for one in outcomes:
        similarity = f"{one.ms_ssim:.4f}" if np.isfinite(one.ms_ssim) else "-"
        table.add_row(
            one.codec,
            f"{one.setting:.4g}",
            f"{one.nbytes:,}",
            f"{one.bpp:.3f}",
            f"{one.psnr:.2f}",
            similarity,
            f"{one.encode_seconds:.3f}",
            f"{one.decode_seconds:.3f}",
        )
    return table


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic export`."""
    _array(parser)
    add = parser.add_argument
    add("target", metavar="TARGET", help="a Zarr array (path or URL), or a .tif or .png file")
    add("--as", dest="kind", choices=("zarr", "tiff", "png"), help="what to write, if its suffix does not tell")
    add("--where", metavar="EXPR", help="copy only chunks that satisfy this; the others hold the fill value")
    add("--crop", action="store_true", help="with --where: only the smallest region that has all of them")
    text = "part to copy, such as y=0:512 x=256:768 t=3"
    add("--region", nargs="+", type=_part, metavar="AXIS=A:B", help=text)
    text = "compression of Zarr (Blosc with Zstd), and of TIFF (Deflate) unless none (default: blosc)"
    add("--codec", choices=("blosc", "none"), default="blosc", help=text)
    add("--format", type=int, choices=(2, 3), help="Zarr format (default: that of the source)")
    add("--overwrite", action="store_true", help="replace an array or file that is there")
    _json(parser)


def export(args: argparse.Namespace) -> None:
    """Copy an array to plain Zarr, TIFF or PNG."""
    from deepsic_codec.io.export import export as copy

    with progress_bar("copying") as progress:
        done = copy(
            args.url,
            args.target,
            args.name,
            kind=args.kind,
            where=args.where,
            region=_parts(args.region),
            crop=args.crop,
            codec=args.codec,
            zarr_format=args.format,
            overwrite=args.overwrite,
            index=args.index,
            progress=progress,
        )
    if args.json:
        print(json.dumps(asdict(done)))
        return
    console = _console()
    left = f", {done.left_out:,} others left at the fill value" if done.left_out else ""
    what = f"{done.kind}, {_times(done.shape)} {done.dtype}, {done.nbytes:,} bytes of samples"
    _say(console, f"{what}, {done.chunks:,} chunks decoded{left} in {done.seconds:.1f} s")
    for target in done.targets[:20]:
        _say(console, f"wrote {target}")
    if len(done.targets) > 20:
        _say(console, f"and {len(done.targets) - 20:,} more files")
