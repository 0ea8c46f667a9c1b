"""The command `compare`."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsic_codec.cli.console import progress_bar, say, say_json, say_table
from deepsic_codec.cli.options import (
    add_encoder_options,
    add_json,
    deep_quality,
    encoder_options,
    integers,
    nodata,
    number,
)

if TYPE_CHECKING:
    from deepsic_codec.io.compare import Outcome
    from deepsic_codec.io.compare_data import Advice, Level, Sample
    from deepsic_codec.io.compare_data import Outcome as DataOutcome
    from deepsic_codec.io.images import ImageSource

TARGETS = ("quality", "bpp", "rmse", "max_error")


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic compare`."""
    from deepsic_codec.io.compare import CHUNK
    from deepsic_codec.io.peers import BAND_PEERS, PEERS

    add = parser.add_argument
    text = "what deepsic ingest reads: image files (GeoTIFF included), folders of them, Zarr arrays or groups"
    add("sources", nargs="+", metavar="SOURCE", help=text)
    text = "folder for <image>.png and curve.png of photographs (default: deepsic-compare)"
    add("-o", "--out", type=Path, default=Path("deepsic-compare"), metavar="DIR", help=text)
    rate = parser.add_mutually_exclusive_group()
    text = "1 (smallest) to 200 (best), of DeepSIC (default: 50 for photographs, 50 80 110 for data)"
    rate.add_argument("--quality", type=deep_quality, nargs="+", metavar="Q", help=text)
    bpp = number(0.001, 10000, "bits per pixel, such as 0.5")
    text = "bits per pixel, all bands together, for all codecs, instead of a quality"
    rate.add_argument("--bpp", type=bpp, nargs="+", metavar="BITS", help=text)
    positive = number(0, 1e38, "a number from 0 on, in units of the data")
    text = "root mean square errors of DeepSIC in units of the data, instead of a quality"
    rate.add_argument("--rmse", type=positive, nargs="+", metavar="E", help=text)
    text = "bounds on the error of every sample, in units of the data (default: half of the noise)"
    add("--max-error", type=positive, nargs="+", metavar="E", help=text)
    text = "value of pixels without data: a number, nan, or none (default: as declared by the source)"
    add("--nodata", type=nodata, metavar="VALUE", default=argparse.SUPPRESS, help=text)
    add("--axes", help="axes of a Zarr array, such as yxc, if its dimensions are not named")
    text = f"codecs to compare with: of photographs {', '.join(PEERS)}; of data {', '.join(BAND_PEERS)}"
    add("--codecs", nargs="+", choices=list(PEERS | BAND_PEERS), metavar="CODEC", help=text)
    add("--model", default="base", help="name of a model of DeepSIC (default: base)")
    text = f"edge of its chunks (default: {CHUNK} for photographs, 512 for data or less for many bands)"
    add("--chunk", type=positive, metavar="PIXELS", help=text)
    add_encoder_options(parser)
    crop = integers((2,), "two numbers such as 640,256")
    add("--crop", type=crop, metavar="X,Y", help="top left corner of the enlarged part (default: the busiest part)")
    text = "measure and plot rate-distortion curves of photographs (default: yes)"
    add("--curve", action=argparse.BooleanOptionalAction, default=True, help=text)
    add_json(parser)


def run_compare(args: argparse.Namespace) -> None:
    """Print the results of DeepSIC and other codecs; draw those of photographs."""
    from deepsic_codec.errors import ConfigurationError, UnsupportedArray
    from deepsic_codec.io.compare import DEFAULT, is_photograph
    from deepsic_codec.io.compare_data import DEFAULT as DATA_DEFAULT
    from deepsic_codec.io.peers import BAND_PEERS, PEERS
    from deepsic_codec.io.sources import open_sources
    from deepsic_codec.require import require

    require("compare", "dask", "PIL")
    notes: list[str] = []
    calls: dict[str, Any] = dict.fromkeys(("plain", "renamed"), lambda item: None)
    sources = list(open_sources(args.sources, axes=args.axes, left_out=notes.append, **calls))
    for_data = args.rmse or args.max_error is not None or hasattr(args, "nodata")
    kinds = [not for_data and is_photograph(source) for source in sources]
    photographs, data = ([s for s, kind in zip(sources, kinds, strict=True) if kind is k] for k in (True, False))
    codecs = {}
    for kind, group, known, default in (
        ("photographs", photographs, PEERS, DEFAULT),
        ("data", data, BAND_PEERS, DATA_DEFAULT),
    ):
        codecs[kind] = [name for name in args.codecs or default if name in known]
        if group and not codecs[kind]:
            raise ConfigurationError(f"--codecs: none of them is compared on {kind}; known are {', '.join(known)}")
    for note in [] if args.json else notes:
        say(f"left out: {note}", error=args.quiet)
    documents = _photographs(args, photographs, codecs["photographs"]) if photographs else {}
    if data:
        documents["data"] = []
    for source in data:
        try:
            documents["data"].append(_data(args, source, codecs["data"]))
        except UnsupportedArray as error:
            if len(sources) == 1:
                raise
            notes.append(str(error))
            say(f"left out: {error}", error=args.json)
    if args.json:
        say_json(documents | {"left_out": notes})


def _photographs(args: argparse.Namespace, sources: Sequence["ImageSource"], codecs: Sequence[str]) -> dict[str, Any]:
    """Print and draw the results on photographs at equal bytes; returns them as JSON types."""
    import numpy as np

    from deepsic_codec.io import compare
    from deepsic_codec.require import require

    if args.curve:
        require("compare", "matplotlib")
    compare.find_peers(codecs)
    images = [(source.name, np.asarray(source.values)) for source in sources]
    ours = compare.deepsic(args.model, args.chunk or compare.CHUNK, **encoder_options(args))
    args.out.mkdir(parents=True, exist_ok=True)
    crop = None if args.crop is None else (args.crop[1], args.crop[0])
    options: dict[str, Any] = {"codecs": codecs, "ours": ours}
    outcomes: list[Outcome] = []
    curves: dict[str, list[Outcome]] = {}
    files: list[Path] = []
    rate = {"quality": args.quality[0]} if args.quality else {"bpp": args.bpp[0]} if args.bpp else {}
    with progress_bar("comparing") as progress:
        for name, original, results in compare.at_equal_bytes(images, progress=progress, **rate, **options):
            outcomes += [outcome for outcome, _ in results]
            files.append(_unused(args.out / f"{Path(name).name}.png", files))
            compare.picture(name, original, results, crop).save(files[-1])
    if args.curve:
        with progress_bar("measuring curves") as progress:
            curves = compare.curves(images, progress=progress, **options)
        files.append(_unused(args.out / "curve.png", files))
        compare.plot(files[-1], curves, images[0][0] if len(images) == 1 else f"mean of {len(images)} images")
    if not args.json:
        for name, _ in images:
            _print(name, [outcome for outcome in outcomes if outcome.image == name])
        if len(images) > 1:
            _print(f"mean of {len(images)} images", compare.means(outcomes))
        say("Times are of one call on this machine, after a warm-up; the other codecs use one thread.")
        for file in files:
            say(f"wrote {file}")
    return {
        "images": list(map(asdict, outcomes)),
        "curves": {codec: list(map(asdict, points)) for codec, points in curves.items()},
        "files": [str(file) for file in files],
    }


def _unused(path: Path, files: Collection[Path]) -> Path:
    """Append a number to the name of a file if another image of this run has the name."""
    number, first = 2, path
    while path in files:
        path, number = first.with_name(f"{first.stem}-{number}{first.suffix}"), number + 1
    return path


def _print(title: str, outcomes: Sequence["Outcome"]) -> None:
    columns = ["codec", "setting", "bytes", "bpp", "PSNR dB (peak 255)", "RMSE", "largest error", "MS-SSIM"]
    rows = [
        [
            outcome.codec,
            f"{outcome.setting:.4g}",
            f"{outcome.nbytes:,}",
            f"{outcome.bpp:.3f}",
            f"{outcome.psnr:.2f}",
            f"{outcome.rmse:.3f}",
            f"{outcome.largest:.4g}",
            f"{outcome.ms_ssim:.4f}" if isfinite(outcome.ms_ssim) else "-",
            f"{outcome.encode_seconds:.3f}",
            f"{outcome.decode_seconds:.3f}",
        ]
        for outcome in outcomes
    ]
    say(title)
    say_table([*columns, "encode s", "decode s"], rows)
    say()


def _data(args: argparse.Namespace, source: "ImageSource", codecs: Sequence[str]) -> dict[str, Any]:
    """Print the results on an array of data; returns them as JSON types."""
    from deepsic_codec.io.compare_data import advise, compare_data, levels, take_sample

    codec = {"model": args.model, **encoder_options(args)}
    codec |= {"nodata": args.nodata} if hasattr(args, "nodata") else {}
    sample = take_sample(source, codec=codec, chunk=args.chunk)
    targets = {name: getattr(args, name) for name in TARGETS}
    failures: dict[str, list[str]] = {}  # codecs by reason

    def failed(codec: str, reason: str) -> None:
        failures.setdefault(reason, []).append(codec)

    with progress_bar(source.name) as progress:
        results = list(compare_data(sample, levels(sample, **targets), codecs=codecs, failed=failed, progress=progress))
    advices = advise(results, any(value is not None for value in targets.values()))
    if not args.json:
        _print_data(sample, results, failures)
        _print_advice(sample, advices, args.sources[0] if len(args.sources) == 1 else "SOURCE")
    return {
        "name": source.name,
        "shape": source.values.shape,
        "dtype": str(source.values.dtype),
        "nodata": sample.codec.nodata,
        "chunks": len(sample.scenes),
        "of_chunks": sample.chunks,
        "peak": sample.peak,
        "noise": sample.noise,
        "levels": [
            {"mode": level.mode, "target": level.target, "codec": level.codec, "rows": list(map(asdict, rows))}
            for level, rows in results
        ],
        "failures": failures,
        "use": advices[0].level.codec if advices else None,
    }


def _print_data(
    sample: "Sample", results: Sequence[tuple["Level", Sequence["DataOutcome"]]], failures: Mapping[str, Sequence[str]]
) -> None:
    from deepsic_codec.errors import counted
    from deepsic_codec.io.compare_data import OURS

    values = sample.source.values
    shape = " x ".join(map(str, values.shape))
    height, width = sample.scenes[0].values.shape[:2]
    missing = "" if sample.codec.nodata is None else f", NoData {sample.codec.nodata}"
    part = (
        f"{len(sample.scenes)} of {counted(sample.chunks, 'chunk')}"
        if len(sample.scenes) < sample.chunks
        else "all chunks"
    )
    say(f"{sample.source.name}: {shape} ({sample.source.axes}) {values.dtype}{missing}")
    say(f"measured on {part} of {width} x {height} pixels; noise about {sample.noise:.3g} in units of the data")
    columns = ["codec", "bands", "setting", "bytes", "ratio", "bits/sample", "RMSE", "largest error"]
    columns += [f"PSNR dB (peak {sample.peak:g})", "encode s", "decode s"]
    for level, rows in results:
        say()
        titles = {"lossy": f"{level.codec}, others at as many bytes", "lossless": "without loss"}
        if level.mode == "lossless" and values.dtype.kind == "f":
            titles["lossless"] += " (DeepSIC stores floats within a bound, not without loss)"
        say(titles.get(level.mode, f"errors of at most {level.target:g}"))
        best = {row.codec: row for row in reversed(rows)}  # of the ways to take the bands
        cells = [
            [
                row.codec,
                "" if row.codec == OURS else row.bands,
                f"{row.setting:.4g}",
                f"{row.nbytes:,}",
                f"{row.ratio:.2f}",
                f"{row.bits:.3f}",
                f"{row.rmse:.4g}",
                f"{row.largest:.4g}",
                f"{row.psnr:.2f}",
                f"{row.encode_seconds:.2f}",
                f"{row.decode_seconds:.2f}",
            ]
            for row in rows
            if row is best[row.codec]
        ]
        say_table(columns, cells, left=("bands",))
    say()
    for reason, names in failures.items():
        say(f"not compared: {', '.join(names)}: {reason}")
    say("Errors leave out NoData. Other codecs are shown with the best way to take bands, and use one thread.")


def _print_advice(sample: "Sample", advices: Sequence["Advice"], location: str) -> None:
    """Print how DeepSIC compares at each setting, then the one to use."""
    if not advices:
        say("DeepSIC does not store floats without loss; use one of the codecs above, or --max-error.")
        return
    say()
    for advice in advices:
        closer = advice.ours.closer_bound
        hint = "" if closer is None else f"; max_error={closer:g} is smaller and closer"
        say(f"{advice.level.codec}: {advice.text}{hint}")
    parameters = advices[0].level.parameters.items()
    options = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in parameters)
    axes = f"in Python for values with axes {sample.source.axes}, or on the command line"
    if advices[0].peer is not None and advices[0].change > 0:
        say(f"Here, {advices[0].peer.codec} is better than DeepSIC.")
    say(f"To use: {advices[0].level.codec}, {axes}:")
    say(f"  {advices[0].code(sample)}")
    say(f"  deepsic ingest {location} archive.zarr {options}")
