"""The command `evaluate`."""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from deepsic_codec import config
from deepsic_codec.cli.console import progress_bar, say, say_json, say_table
from deepsic_codec.cli.options import add_encoder_options, add_json, encoder_options, quality
from deepsic_codec.require import require

if TYPE_CHECKING:
    from deepsic_codec.training.evaluate import Result

QUALITIES = (15.0, 35.0, 55.0, 80.0)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic evaluate`."""
    parser.add_argument("images", nargs="+", help="image files, folders, zip files or Zarr arrays of uint8")
    parser.add_argument("--model", default="base", help="name of a model, or a model file (default: base)")
    text = f"1 to 100 (default: {' '.join(f'{q:g}' for q in QUALITIES)})"
    parser.add_argument("--qualities", type=quality, nargs="+", default=QUALITIES, help=text)
    text = "when labels are computed (default: pre)"
    parser.add_argument("--semantics", choices=("pre", "post", "none"), default="pre", help=text)
    add_encoder_options(parser)
    parser.add_argument("--labelled", action="store_true", help="the folder of each image is the name of its class")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--per-image", action="store_true", help="print every image, not only the means")
    add_json(parser)
    parser.add_argument("--csv", metavar="FILE", help="write all results, one row each")


def run_evaluate(args: argparse.Namespace) -> None:
    """Evaluate a model and print the results.

    Raises
    ------
    ConfigurationError
        If no image can be read.
    ModelNotFound
        If there is no such model.
    MissingPackage
        If torch is not installed.
    """
    require("train", "torch")
    from deepsic_codec.errors import ConfigurationError, counted
    from deepsic_codec.model.families import architecture_from
    from deepsic_codec.model.file import read_info
    from deepsic_codec.model.zoo import find_model
    from deepsic_codec.training.data import read_images
    from deepsic_codec.training.evaluate import Result, complexity, evaluate, means

    name = args.model
    if Path(name).is_file():
        # Payloads name a model by its identity; readers search this path for it.
        config.set(model_path=(name, *config.get().model_path))
        name = read_info(name).name
    info = find_model(name)
    skipped: list[str] = []
    images = [pair for source in args.images for pair in read_images(source, skipped)][: args.limit]
    if not images:
        raise ConfigurationError(f"no readable image in {', '.join(args.images)}")
    cost = complexity(architecture_from(info.architecture))
    options = encoder_options(args)
    results: list[Result] = []
    with progress_bar("evaluating") as progress:
        for value in args.qualities:
            for result in evaluate(images, name, value, args.semantics, args.labelled, **options):
                results.append(result)
                progress(len(results), len(images) * len(args.qualities))
    averages = means(results)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Result)])
            writer.writeheader()
            writer.writerows(map(asdict, results + averages))
    if args.json:
        say_json(
            {
                "model": info.name,
                "decoder": info.decoder,
                "head": info.head,
                "encoder": info.encoder,
                "kmac_per_pixel": cost,
                "skipped": skipped,
                "means": list(map(asdict, averages)),
                "images": list(map(asdict, results)),
            }
        )
        return
    for path in skipped:
        say(f"skipped: {path}", error=args.quiet)
    say(f"{info.name}, decoder {info.decoder[:16]}, head {info.head[:16]}; {counted(len(images), 'image')}")
    say("kMAC/px: " + ", ".join(f"{k} {v:.2f}" for k, v in cost.items()))
    _print([*results, *averages] if args.per_image else averages)


def _print(results: Sequence["Result"]) -> None:
    columns = ["image", "quality", "bytes", "bpp", "PSNR dB (peak 255)", "luma dB", "RMSE", "largest error"]
    columns += ["MS-SSIM", "top-1"]
    rows = [
        [
            result.image,
            f"{result.quality:g}",
            f"{result.nbytes:.0f}",
            f"{result.bpp:.4f}",
            f"{result.psnr:.2f}",
            f"{result.psnr_luma:.2f}",
            f"{result.rmse:.3f}",
            f"{result.largest:.1f}".removesuffix(".0"),
            f"{result.ms_ssim:.4f}" if isfinite(result.ms_ssim) else "-",
            f"{result.top1:.3f}" if isfinite(result.top1) else "-",
        ]
        for result in results
    ]
    say_table(columns, rows)
