"""The command `compare`."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsic_codec.cli.console import progress_bar, say, say_json, say_table
from deepsic_codec.cli.options import add_encoder_options, add_json, add_quality, encoder_options, integers, number

if TYPE_CHECKING:
    from deepsic_codec.io.compare import Outcome


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic compare`."""
    from deepsic_codec.io.compare import CHUNK, DEFAULT
    from deepsic_codec.io.peers import PEERS

    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files (more than 8 bits are stretched to 8)")
    text = "folder for <image>.png and curve.png (default: deepsic-compare)"
    add("--out", type=Path, default=Path("deepsic-compare"), metavar="DIR", help=text)
    rate = parser.add_mutually_exclusive_group()
    add_quality(rate, note=", of DeepSIC (default: 50)")
    bpp = number(0.001, 1000, "bits per pixel, such as 0.5")
    rate.add_argument("--bpp", type=bpp, help="bits per pixel for all codecs, instead of a quality")
    text = f"codecs to compare with (default: {', '.join(DEFAULT)})"
    add("--codecs", nargs="+", choices=list(PEERS), default=list(DEFAULT), metavar="CODEC", help=text)
    add("--model", default="base", help="name of a model of DeepSIC (default: base)")
    add("--chunk", type=int, default=CHUNK, metavar="PIXELS", help=f"largest edge of its chunks (default: {CHUNK})")
    add_encoder_options(parser)
    crop = integers((2,), "two numbers such as 640,256")
    add("--crop", type=crop, metavar="X,Y", help="top left corner of the enlarged part (default: the busiest part)")
    text = "measure and plot rate-distortion curves (default: yes)"
    add("--curve", action=argparse.BooleanOptionalAction, default=True, help=text)
    add_json(parser)


def run_compare(args: argparse.Namespace) -> None:
    """Print and draw the results of DeepSIC and other codecs at equal bytes."""
    from deepsic_codec.io import compare
    from deepsic_codec.require import require

    require("cli", "PIL")
    if args.curve:
        require("compare", "matplotlib")
    images = [(path.name, compare.read_image(path)) for path in args.images]
    ours = compare.deepsic(args.model, args.chunk, **encoder_options(args))
    compare.find_peers(args.codecs)
    args.out.mkdir(parents=True, exist_ok=True)
    crop = None if args.crop is None else (args.crop[1], args.crop[0])
    options: dict[str, Any] = {"codecs": args.codecs, "ours": ours}
    outcomes: list[Outcome] = []
    curves: dict[str, list[Outcome]] = {}
    files: list[Path] = []
    with progress_bar("comparing") as progress:
        for name, original, results in compare.at_equal_bytes(
            images, quality=args.quality, bpp=args.bpp, progress=progress, **options
        ):
            outcomes += [outcome for outcome, _ in results]
            files.append(_unused(args.out / f"{Path(name).stem}.png", files))
            compare.picture(name, original, results, crop).save(files[-1])
    if args.curve:
        with progress_bar("measuring curves") as progress:
            curves = compare.curves(images, progress=progress, **options)
        files.append(_unused(args.out / "curve.png", files))
        compare.plot(files[-1], curves, images[0][0] if len(images) == 1 else f"mean of {len(images)} images")
    if args.json:
        document = {
            "images": list(map(asdict, outcomes)),
            "curves": {codec: list(map(asdict, points)) for codec, points in curves.items()},
            "files": [str(file) for file in files],
        }
        say_json(document)
        return
    for name, _ in images:
        _print(name, [outcome for outcome in outcomes if outcome.image == name])
    if len(images) > 1:
        _print(f"mean of {len(images)} images", compare.means(outcomes))
    say("Times are of one call on this machine, after a warm-up; the other codecs use one thread.")
    for file in files:
        say(f"wrote {file}")


def _unused(path: Path, files: Collection[Path]) -> Path:
    """Append a number to the name of a file if another image of this run has the name."""
    number, first = 2, path
    while path in files:
        path, number = first.with_name(f"{first.stem}-{number}{first.suffix}"), number + 1
    return path


def _print(title: str, outcomes: Sequence["Outcome"]) -> None:
    columns = ["codec", "setting", "bytes", "bpp", "PSNR dB", "MS-SSIM", "encode s", "decode s"]
    rows = [
        [
            outcome.codec,
            f"{outcome.setting:.4g}",
            f"{outcome.nbytes:,}",
            f"{outcome.bpp:.3f}",
            f"{outcome.psnr:.2f}",
            f"{outcome.ms_ssim:.4f}" if isfinite(outcome.ms_ssim) else "-",
            f"{outcome.encode_seconds:.3f}",
            f"{outcome.decode_seconds:.3f}",
        ]
        for outcome in outcomes
    ]
    say(title)
    say_table(columns, rows)
    say()
