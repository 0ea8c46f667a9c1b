"""`deepsic evaluate`: what a model makes of images, from the bytes that it really writes."""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.cli.encoder_options import add_encoder_options, encoder_options
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.metrics import luma, ms_ssim, psnr

QUALITIES = (15.0, 35.0, 55.0, 80.0)
#: Images in one call of the codec; their pixels bound the memory that is used.
BATCH_PIXELS = 1 << 22


@dataclass(frozen=True)
class Result:
    """One image at one quality, or the mean of all at one quality."""

    image: str
    quality: float
    nbytes: float  # the whole payload, header and labels included
    bpp: float
    psnr: float  # dB, RGB
    psnr_luma: float  # dB
    ms_ssim: float  # NaN for images with an edge below 176 pixels
    label: str = ""  # the true class, of labelled images
    found: str = ""  # the class of the highest score, and "" without labels
    top1: float = float("nan")  # 1 if found is label, else 0; the mean is over labelled images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``deepsic evaluate``."""
    parser.add_argument("images", nargs="+", help="image files, folders, zip files or Zarr arrays of uint8")
    parser.add_argument("--model", default="base", help="name of a model, or a model file (default: base)")
    text = f"1 to 100 (default: {' '.join(f'{q:g}' for q in QUALITIES)})"
    parser.add_argument("--qualities", type=float, nargs="+", default=QUALITIES, help=text)
    parser.add_argument("--semantics", choices=("pre", "post", "none"), default="pre", help="default: pre")
    add_encoder_options(parser)
    parser.add_argument("--labelled", action="store_true", help="the folder of each image names its class")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--per-image", action="store_true", help="print every image, not the means alone")
    text = "print all results as JSON instead; > FILE writes them to a file"
    parser.add_argument("--json", action="store_true", help=text)
    parser.add_argument("--csv", metavar="FILE", help="write all results, one row each")


def run(args: argparse.Namespace) -> None:
    """Evaluate and print.

    Raises
    ------
    ConfigurationError
        If there is no image that can be read.
    ModelNotFound
        If there is no such model.
    """
    from rich.console import Console
    from rich.table import Table

    from deepsic_codec.model.file import read_info
    from deepsic_codec.model.scheduler import get_scheduler
    from deepsic_codec.model.zoo import SEARCH_VARIABLE, find_model
    from deepsic_codec.training.data import read_images

    name = args.model
    if Path(name).is_file():
        # array metadata and payloads name a model by its identity, and readers find it along this path
        os.environ[SEARCH_VARIABLE] = os.pathsep.join(filter(None, [name, os.environ.get(SEARCH_VARIABLE)]))
        name = read_info(name).name
    info = find_model(name)
    skipped: list[str] = []
    images = [pair for source in args.images for pair in read_images(source, skipped)][: args.limit]
    if not images:
        raise ConfigurationError(f"no readable image in {', '.join(args.images)}")
    console = Console(width=None if os.isatty(1) else 110, quiet=args.json)
    for path in skipped:
        console.print(f"skipped: {path}", markup=False, highlight=False, soft_wrap=True)
    cost = complexity(get_scheduler(info))
    console.print(f"{info.name}, decoder {info.decoder[:16]}, head {info.head[:16]}; {len(images)} images")
    console.print("kMAC/px: " + ", ".join(f"{k} {v:.2f}" for k, v in cost.items()), highlight=False)
    options = encoder_options(args)
    results = [r for q in args.qualities for r in evaluate(images, name, q, args.semantics, args.labelled, **options)]
    averages = means(results)
    shown = (results if args.per_image else []) + averages
    labelled = any(r.label for r in results)
    table = Table("image", "quality", "bytes", "bpp", "PSNR dB", "luma dB", "MS-SSIM", *(["top-1"] if labelled else []))
    for r in shown:
        cells = [r.image, f"{r.quality:g}", f"{r.nbytes:.0f}", f"{r.bpp:.4f}", f"{r.psnr:.2f}", f"{r.psnr_luma:.2f}"]
        cells.append("-" if np.isnan(r.ms_ssim) else f"{r.ms_ssim:.4f}")
        table.add_row(*cells, *([f"{r.top1:.3f}"] if labelled else []))
    console.print(table)
    if args.json:
        document = {
            "model": info.name,
            "decoder": info.decoder,
            "head": info.head,
            "encoder": info.encoder,
            "kmac_per_pixel": cost,
            "skipped": skipped,
            "means": _plain(averages),
            "images": _plain(results),
        }
        print(json.dumps(document, allow_nan=False))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Result)])
            writer.writeheader()
            writer.writerows(_plain(results + averages))


def evaluate(
    images: Sequence[tuple[str, NDArray[np.uint8]]],
    model: str,
    quality: float,
    semantics: str = "pre",
    labelled: bool = False,
    **options: Any,
) -> Iterator[Result]:
    """Encode and decode images (H,W,3) at one quality, each as one chunk; labels come from the payload.

    With ``labelled`` the folder in an image's name is its true class; ``options`` go to ``DeepSIC``.
    """
    from deepsic_codec.codec.v2 import DeepSIC

    codec = DeepSIC(model=model, quality=quality, semantics=semantics, **options)
    for part in _batches(images):
        payloads = codec.encode_batch([pixels for _, pixels in part])
        decoded = codec.decode_batch(payloads)
        for (name, pixels), payload, found in zip(part, payloads, decoded, strict=True):
            height, width = pixels.shape[:2]
            label = Path(name).parent.name if labelled else ""
            best = best_label(payload, model) if labelled and semantics != "none" else ""
            yield Result(
                image=name,
                quality=quality,
                nbytes=len(payload),
                bpp=8 * len(payload) / (height * width),
                psnr=psnr(pixels, found),
                psnr_luma=psnr(luma(pixels), luma(found)),
                ms_ssim=ms_ssim(pixels, found) if min(height, width) >= 176 else float("nan"),
                label=label,
                found=best,
                top1=float(best == label) if best else float("nan"),
            )


def best_label(payload: bytes, model: str) -> str:
    """Name of the highest score of any tile: from the label section or, without one, from the stored features."""
    from deepsic_codec.model.scheduler import get_scheduler
    from deepsic_codec.model.zoo import find_model
    from deepsic_codec.payload.header import unpack
    from deepsic_codec.payload.sections import FEATURES, LABELS

    unpacked = unpack(payload)
    header, labels = unpacked.header, unpacked.read(LABELS)
    info = find_model(model)
    names = info.vocabulary.names
    if labels is None:
        features, runtime = unpacked.read(FEATURES), get_scheduler(info)
        shape, quality = (header.slices, header.height, header.width), [header.quality]
        symbols = runtime.decode_symbols([features or b""], [shape], quality)
        scores = runtime.score(symbols, [shape], quality)[0]
    else:
        scores = labels.dense(len(names))
    best = scores.reshape(-1, len(names)).max(0)
    return names[int(best.argmax())] if best.any() else "unknown"


def means(results: Sequence[Result]) -> list[Result]:
    """Mean over the images at each quality."""
    out = []
    for quality in dict.fromkeys(r.quality for r in results):
        part = [r for r in results if r.quality == quality]
        numbers: dict[str, Any] = {}
        for name in ("nbytes", "bpp", "psnr", "psnr_luma", "ms_ssim", "top1"):
            known = [v for v in (getattr(r, name) for r in part) if not np.isnan(v)]
            numbers[name] = float(np.mean(known)) if known else float("nan")
        out.append(
            Result(image=f"mean of {len(part)}", quality=quality, label="all" if part[0].label else "", **numbers)
        )
    return out


def complexity(runtime: Any) -> dict[str, float]:
    """Thousands of multiply-accumulates per pixel of each network; decoding is prior and synthesis."""
    from deepsic_codec.model.families import family_of

    arch = runtime.model.arch
    parts = family_of(arch).complexity(arch)
    return parts | {"decoding": parts["prior"] + parts["synthesis"]}


def _batches(images: Sequence[tuple[str, NDArray[np.uint8]]]) -> Iterator[list[tuple[str, NDArray[np.uint8]]]]:
    part: list[tuple[str, NDArray[np.uint8]]] = []
    pixels = 0
    for image in images:
        size = image[1].shape[0] * image[1].shape[1]
        if part and pixels + size > BATCH_PIXELS:
            yield part
            part, pixels = [], 0
        part.append(image)
        pixels += size
    if part:
        yield part


def _plain(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Plain dictionaries; NaN is not JSON and becomes None."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return [{k: plain(v) for k, v in asdict(r).items()} for r in results]
