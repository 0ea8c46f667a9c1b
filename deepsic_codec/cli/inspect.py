"""The commands `info`, `preview` and `export`."""

import argparse
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepsic_codec.cli.console import progress_bar, say, say_json
from deepsic_codec.cli.options import add_array, add_json, axis_part, integers
from deepsic_codec.errors import ConfigurationError, counted

MAX_CLASSES = 12  # of the list of labels
MAX_FILES = 20  # of the list of exported files
WIDTH = 120  # columns, if standard output is no terminal
LABEL_WIDTH = 16  # columns for the name of a row
GROUP_MEMBERS = ("arrays", "other_arrays", "label_indices", "embedded_models")


def add_info(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic info`."""
    parser.add_argument("url", metavar="URL", nargs="?", help="path or URL of an array or group of Zarr")
    text = "describe this installation instead: versions, and what runs the networks"
    parser.add_argument("--system", action="store_true", help=text)
    parser.add_argument("--name", help="one array in the group")
    parser.add_argument("--index", metavar="URL", help="location of the label index, if not beside the array")
    parser.add_argument("--all", action="store_true", help="read the headers of all chunks, not of a sample")
    add_json(parser)


def run_info(args: argparse.Namespace) -> None:
    """Print a description of an archive, or of this installation."""
    if args.system:
        _print_system(args.json)
        return
    if args.url is None:
        raise ConfigurationError("expected the URL of an archive, or --system")
    from deepsic_codec.io.info import describe

    description = describe(args.url, args.name, index=args.index, everything=args.all)
    if args.json:
        say_json(description)
        return
    if description["kind"] == "array":
        _print_array(description)
        return
    counts = [f"{key.replace('_', ' ')}: {len(description[key])}" for key in GROUP_MEMBERS if description[key]]
    say(f"{description['store']}: group, Zarr format {description['zarr_format']}; {', '.join(counts) or 'empty'}\n")
    for array in [*description["arrays"], *description["other_arrays"]]:
        _print_array(array)


def _print_system(as_json: bool) -> None:
    from deepsic_codec.io.system import describe_system

    system = describe_system()
    if as_json:
        say_json(system)
        return
    cpu, gpus = system["cpu"], system["gpus"]
    rows = {
        "versions": ", ".join(f"{name} {version}" for name, version in system["packages"].items() if version),
        "Python": f"{system['python']}, {system['platform']}",
        "CPU": f"{cpu['name']}, {cpu['threads']} threads of {cpu['cores']} cores",
        "kernels": f"{cpu['kernels']}, products {cpu['instructions']}",
        "GPU": "not used: torch is not installed" if gpus is None else ", ".join(gpus) or "none",
        "networks run on": system["device"],
    }
    for name, text in rows.items():
        say(f"{name:<{LABEL_WIDTH}}{text}")


def _print_array(array: Mapping[str, Any]) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    say(str(array["store"]))
    for name, text in _rows(array).items():
        space = max(40, width - LABEL_WIDTH - 2)
        first, *others = textwrap.wrap(text, space, break_on_hyphens=False) or [""]
        say(f"  {name:<{LABEL_WIDTH}}{first}")
        for line in others:
            say(f"{'':{LABEL_WIDTH + 2}}{line}")
    say()


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes)) or "scalar"


def _rows(array: Mapping[str, Any]) -> dict[str, str]:
    """Return name and text of each row."""
    if "codec_parameters" not in array:
        return {
            "array": f"{_times(array['shape'])} {array['dtype']}",
            "chunks": _times(array["chunk_shape"]),
            "Zarr format": str(array["zarr_format"]),
            "codec": f"{array['codec']} (not DeepSIC)",
        }
    chunks, size, model = array["chunks"], array["size"], array["model"]
    about = "" if array["exact"] else "about "
    names = ", ".join(array["dimension_names"])
    shards = f" in shards of {_times(array['shard_shape'])}" if array["shard_shape"] else ""
    stored = f"{about}{chunks['stored']:,} of {chunks['total']:,} stored, {about}{chunks['missing']:,} missing"
    head = (model["head"] or "none")[:16]
    rows = {
        "array": f"{_times(array['shape'])} ({names}) {array['dtype']}, fill {array['fill_value']}",
        "chunks": f"{_times(array['chunk_shape'])}{shards}; {stored}",
        "Zarr format": str(array["zarr_format"]),
        "codec": f"deepsic, {_parameters(array['codec_parameters'])}",
        "model": f"{model['name']}, decoder {model['decoder'][:16]}, head {head}; {_availability(model)}",
        **_writers(array),
    }
    if size["bytes"]:
        rows["size"] = (
            f"{about}{size['bytes']:,} bytes for {size['array_bytes']:,}; {size['bpp']:.3f} bits per pixel, "
            f"{size['bits_per_sample']:.3f} per sample, ratio {size['ratio']:.1f}"
        )
    if size.get("parts"):
        rows["parts"] = ", ".join(f"{name} {part:.1%}" for name, part in size["parts"].items())
    rows["error"] = _error(array["error"])
    rows["labels"] = _labels(array["labels"], array["label_tile"])
    if not array["exact"]:
        rows["sampled"] = f"{chunks['headers_read']:,} of {chunks['total']:,} headers; --all reads all"
    read = array["read"]
    rows["read for this"] = f"{read['bytes']:,} bytes in {counted(read['requests'], 'request')}, nothing decoded"
    return rows


def _parameters(parameters: Mapping[str, Any]) -> str:
    """Return the parameters that are set, but for those in other rows."""
    elsewhere = ("model", "decoder", "head", "axes")
    visible = {k: v for k, v in parameters.items() if k not in elsewhere and v not in (None, {}, [])}
    return ", ".join(f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in visible.items())


def _availability(model: Mapping[str, Any]) -> str:
    if not model["installed"]:
        if model["embedded"]:
            return "in the archive"
        return "not installed, so pixels cannot be decoded (DEEPSIC_MODEL_PATH names the folder of models)"
    text = "installed" if model["head_installed"] else "installed with another head"
    return f"{text}, and in the archive" if model["embedded"] else text


def _writers(array: Mapping[str, Any]) -> dict[str, str]:
    """Return rows about the chunks' own headers, as far as they differ from the metadata."""
    writers, parameters = array["written_by"], array["codec_parameters"]
    formats = sorted({writer["payload_format"] for writer in writers})
    rows = {"payload format": ", ".join(map(str, formats))} if formats else {}
    qualities, decoders = ({writer[key] for writer in writers} for key in ("quality", "decoder"))
    if writers and (qualities, decoders) != ({parameters.get("quality")}, {parameters["decoder"][:16]}):
        ends = f"{min(qualities):g}" if len(qualities) == 1 else f"{min(qualities):g} to {max(qualities):g}"
        rows["written with"] = f"quality {ends}, decoder {', '.join(sorted(decoders))}"
    return rows


def _error(error: Mapping[str, Any]) -> str:
    if error["max_error"] is not None:
        return (
            f"at most {error['max_error']:g} units of the data in any sample"
            if error["max_error"]
            else "none: lossless"
        )
    if error["rmse"] is not None:
        return f"RMSE of about {error['rmse']:g} in units of the data, in each chunk; no bound on the largest error"
    if error["step"] is None:
        return "unknown: no chunk was read"
    rms = error["rms"]
    less = "" if error["psnr"] else ", less where the image has less detail"
    less += f"; quantiser step {error['step']:.3g} of 255"
    if error["unit"] is None:
        return f"RMSE of about {rms:.2g} of 255 in a range that differs from chunk to chunk{less}"
    units = error["unit"] if isinstance(error["unit"], list) else [error["unit"]]
    sizes = ", ".join(f"{unit * rms:.3g}" for unit in units)
    peaks = ", ".join(f"{unit * 255:.6g}" for unit in units)
    psnr = f"PSNR of about {20 * math.log10(255 / rms):.1f} dB, peak {peaks}"
    return f"RMSE of about {sizes} in units of the data ({psnr}){less}; no bound on the largest error"


def _labels(labels: Mapping[str, Any], tile: Sequence[int]) -> str:
    if labels["from"] is None:
        return labels["note"]
    ranked = sorted(((count, name) for name, count in labels["classes"].items() if count), reverse=True)
    counts = ", ".join(f"{name} {count:,}" for count, name in ranked[:MAX_CLASSES]) or "none that scores 0.5"
    more = f" and {len(ranked) - MAX_CLASSES} more" if len(ranked) > MAX_CLASSES else ""
    source = "the index" if labels["from"] == "index" else "headers"
    of_all = f"of {labels['of_chunks']:,}, from {source}, tiles {_times(tile)}"
    return f"chunks that show a class, {of_all}: {counts}{more}"


def add_preview(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic preview`."""
    add_array(parser)
    add = parser.add_argument
    text = "file to write (default: preview.png)"
    add("-o", "--out", type=Path, default=Path("preview.png"), metavar="PNG", help=text)
    add("--size", type=int, default=1024, metavar="PIXELS", help="longer edge of the image (default: 1024)")
    text = "add an image with the best label of each tile (default: yes, unless --where is given)"
    add("--labels", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "add an image with the quality of each chunk, or of its squares of 16 x 16 pixels if it has a map"
    add("--map", action="store_true", help=text)
    add("--where", metavar="EXPR", help="dim everything that does not satisfy this, such as 'River > 0.6'")
    text = "position along other axes, such as t=3 (default: 0)"
    add("--select", nargs="+", type=axis_part, metavar="AXIS=N", help=text)
    bands = integers((1, 3), "one or three numbers such as 3,2,1")
    add("--bands", type=bands, metavar="R,G,B", help="one or three bands to show (default: the first)")
    text = "scale values between their percentiles (default: yes, except for uint8 with 1 or 3 bands)"
    add("--stretch", action=argparse.BooleanOptionalAction, default=None, help=text)
    add("--all", action="store_true", help="decode all chunks, however many there are")
    add_json(parser)


def run_preview(args: argparse.Namespace) -> None:
    """Write a small picture of an array."""
    from deepsic_codec.io.preview import preview

    with progress_bar("decoding") as progress:
        result = preview(
            args.url,
            args.name,
            size=args.size,
            labels=args.labels,
            quality_map=args.map,
            where=args.where,
            select=dict(args.select or ()),
            bands=args.bands,
            stretch=args.stretch,
            everything=args.all,
            index=args.index,
            progress=progress,
        )
    result.image.save(args.out)
    if args.json:
        about = {"out": str(args.out), "chunks": result.chunks, "decoded": result.decoded, "sampled": result.sampled}
        about |= {"scale": result.scale, "bytes_read": result.bytes_read}
        say_json({**about, "tiles": result.classes, "qualities": result.qualities, "stretch": result.limits})
        return
    sampled = "; each stands for its neighbours" if result.sampled else ""
    reduced = f" at 1/{result.scale} of their size" if result.scale > 1 else ""
    chunks = f"{result.decoded:,} of {counted(result.chunks, 'chunk')} decoded{reduced}"
    say(f"{args.out}: {chunks} from {result.bytes_read:,} bytes{sampled}")


def add_export(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic export`."""
    add_array(parser)
    add = parser.add_argument
    add("target", metavar="TARGET", help="a Zarr array (path or URL), or a .tif or .png file")
    add("--as", dest="kind", choices=("zarr", "tiff", "png"), help="format, if the suffix of the target does not tell")
    add("--where", metavar="EXPR", help="copy only chunks that satisfy this; the others get the fill value")
    add("--crop", action="store_true", help="with --where: only the smallest region with all of these chunks")
    text = "part to copy, such as y=0:512 x=256:768 t=3"
    add("--region", nargs="+", type=axis_part, metavar="AXIS=A:B", help=text)
    text = "compression of Zarr (Blosc with Zstd), and of TIFF (Deflate) unless none (default: blosc)"
    add("--codec", choices=("blosc", "none"), default="blosc", help=text)
    add("--format", type=int, choices=(2, 3), help="Zarr format (default: that of the source)")
    add("--overwrite", action="store_true", help="replace an existing array or file")
    add_json(parser)


def run_export(args: argparse.Namespace) -> None:
    """Copy an array to plain Zarr, TIFF or PNG."""
    from deepsic_codec.io.export import export

    with progress_bar("copying") as progress:
        result = export(
            args.url,
            args.target,
            args.name,
            kind=args.kind,
            where=args.where,
            region=dict(args.region or ()),
            crop=args.crop,
            codec=args.codec,
            zarr_format=args.format,
            overwrite=args.overwrite,
            index=args.index,
            progress=progress,
        )
    if args.json:
        say_json(asdict(result))
        return
    left = f", {counted(result.left_out, 'other')} left at the fill value" if result.left_out else ""
    say(
        f"{result.kind}, {_times(result.shape)} {result.dtype}, {result.nbytes:,} bytes of samples, "
        f"{counted(result.chunks, 'chunk')} decoded{left} in {result.seconds:.1f} s"
    )
    for target in result.targets[:MAX_FILES]:
        say(f"wrote {target}")
    if len(result.targets) > MAX_FILES:
        say(f"and {counted(len(result.targets) - MAX_FILES, 'more file')}")
