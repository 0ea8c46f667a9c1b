"""Rate-distortion on a folder of images: DeepSIC and its peers in one run, from the bytes each really writes.

    python -m benchmarks.rd --images KODAK --png rd.png --json rd.json --csv rd.csv

Bits per pixel, PSNR (RGB and luma) and MS-SSIM are taken per image and averaged over the images at each setting, the
convention of the literature.  BD-rates are over 0.15 to 1.5 bpp.

Such averages depend on what a codec holds fixed.  The same bytes for every image give the highest mean PSNR for a mean
rate, the same PSNR for every image the lowest, and the same quality setting lies between.  So JPEG 2000 comes in both
modes, ``--rates`` measures DeepSIC at fixed rates too, as an array made with ``DeepSIC(bpp=...)`` is stored, and
BD-rates are also given image by image, which no mode changes much: BD-rate of each image, then the mean.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.common import PEERS, Pixels, machine, over_threads, read_images, table
from benchmarks.metrics import BPP_RANGE, Curve, bd_rate
from deepsic_codec.cli.console import finite
from deepsic_codec.metrics import luma, ms_ssim, psnr

OURS = "DeepSIC"
BY_RATE = "DeepSIC by rate"
#: The published networks of DeepSIC, one model per rate.
PER_RATE = "the paper's networks"
#: What it may be compared with by means: codecs that hold the rate fixed, too.
ALSO_BY_RATE = (OURS, "JPEG 2000 ratio")
QUALITIES = (1, 8, 15, 22, 30, 38, 46, 54, 62, 70, 80, 90, 100)
MEASURES = ("psnr_rgb", "psnr_luma", "ms_ssim")
# Curves of the data file that are drawn and compared where it has them: what each stands for in a legend.
PUBLISHED = {
    "compressai:bpg_444_x265_ycbcr": "BPG 4:4:4",
    "compressai:vtm": "VTM",
    "compressai:compressai-bmshj2018-hyperprior_mse_cpu": "Hyperprior 2018",
    "measured:jpegxl_e9": "JPEG XL e9",
    "measured:avif444_s2": "AVIF 4:4:4 s2",
}


@dataclass(frozen=True)
class Point:
    """One image at one setting."""

    codec: str
    setting: float
    image: str
    bpp: float
    psnr_rgb: float  # dB
    psnr_luma: float  # dB
    ms_ssim: float  # NaN for images under 176 pixels


Averages = dict[str, list[dict[str, float]]]  # codec -> settings in order of rate


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = _arguments(argv)
    images = read_images(args.images, args.limit)
    print(machine(args.threads))
    print(f"{len(images)} images in {os.path.basename(os.path.normpath(args.images))}\n")

    points = [] if args.no_deepsic else measure_deepsic(images, args.qualities, args)
    for options in args.efforts:
        points += measure_deepsic(images, args.qualities, args, _effort(options), options=options)
    for model in args.beside:
        rate = _only_rate(model)
        if rate is None:
            points += measure_deepsic(images, args.qualities, args, f"{OURS} {model}", model=model)
        else:  # models of one rate each are a curve together
            measured = measure_deepsic(images, [50.0], args, PER_RATE, model=model)
            points += [replace(point, setting=rate) for point in measured]
    points += measure_deepsic(images, args.rates, args, BY_RATE, mode="bpp")
    for name in args.codecs:
        points += measure_peer(name, images, args.threads)
    averages = average(points)
    published = read_published(args.published) if args.published else {}

    print(settings_table(averages), "\n")
    print(rates_table(averages), "\n")
    # Published curves are means over a whole data set: a part of it must not be compared with them.
    theirs = {} if args.limit else published
    comparison = compare(points, averages, theirs) if OURS in averages else []
    alike = {k: v for k, v in averages.items() if k in (BY_RATE, *ALSO_BY_RATE)}
    by_rate = compare(points, alike, {}, BY_RATE) if BY_RATE in averages else []
    by_effort = {}
    for name in map(_effort, args.efforts):
        others = {k: v for k, v in averages.items() if k == name or not k.startswith(OURS)}
        by_effort[name] = compare(points, others, theirs, name)
    for ours, rows in ((OURS, comparison), *by_effort.items(), (BY_RATE, by_rate)):
        print(comparison_table(rows, ours) + "\n" if rows else "")
    if comparison:
        print(f"Published curves are from {os.path.basename(args.published)}, for Kodak.\n" if args.published else "")
    if args.csv:
        write_csv(args.csv, averages)
    if args.json:
        comparisons = {OURS: comparison, BY_RATE: by_rate} | by_effort
        write_json(args.json, machine(args.threads), points, averages, comparisons)
    if args.png:
        plot(args.png, averages, published, f"{len(images)} images, mean per image")
    print(conclusion(comparison))


def measure_deepsic(
    images: list[tuple[str, Pixels]],
    settings: Sequence[float],
    args: Any,
    name: str = OURS,
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    mode: str = "quality",
) -> list[Point]:
    """Our codec at every setting of a mode (quality, bpp); each image is one chunk, header and labels counted."""
    from deepsic_codec import DeepSIC

    points = []
    for setting in settings:
        print(f"{name}: {mode} {setting:g}", file=sys.stderr)
        parameters: dict[str, Any] = {"transform": args.transform, mode: setting} | dict(options or {})
        codec = DeepSIC(model=model or args.model, semantics=args.semantics, **parameters)
        for start in range(0, len(images), args.batch):
            part = images[start : start + args.batch]
            payloads = codec.encode_batch([pixels for _, pixels in part])
            decoded = codec.decode_batch(payloads)
            jobs = [(image, x, d, y) for (image, x), d, y in zip(part, payloads, decoded, strict=True)]
            points += over_threads(
                lambda job, q=setting: _point(name, q, job[0], job[1], len(job[2]), job[3]), jobs, args.threads
            )
    return points


def _effort(options: Mapping[str, Any]) -> str:
    return f"{OURS} effort {options['effort']}" + (f", {options['tune']}" if "tune" in options else "")


def _effort_and_tune(text: str) -> dict[str, Any]:
    effort, colon, tune = text.partition(":")
    return {"effort": int(effort)} | ({"tune": tune} if colon else {})


def _only_rate(model: str) -> float | None:
    """Bits per pixel that the paper's networks were trained for; None for a model of all qualities."""
    from deepsic_codec.model.families import architecture_from
    from deepsic_codec.model.zoo import find_model

    return getattr(architecture_from(find_model(model).architecture), "rate", None)


def measure_peer(name: str, images: list[tuple[str, Pixels]], threads: int) -> list[Point]:
    """Measure a peer at all its settings."""
    peer = PEERS[name]
    print(name, file=sys.stderr)

    def one(job: tuple[float, str, Pixels]) -> Point:
        setting, image, pixels = job
        data = peer.encode(pixels, setting)
        return _point(name, setting, image, pixels, len(data), peer.decode(data))

    return over_threads(one, [(s, image, x) for s in peer.settings for image, x in images], threads)


def _point(codec: str, setting: float, image: str, original: Pixels, nbytes: int, decoded: Any) -> Point:
    height, width = original.shape[:2]
    return Point(
        codec=codec,
        setting=float(setting),
        image=image,
        bpp=8 * nbytes / (height * width),
        psnr_rgb=psnr(original, decoded),
        psnr_luma=psnr(luma(original), luma(decoded)),
        ms_ssim=ms_ssim(original, decoded) if min(height, width) >= 176 else float("nan"),
    )


def average(points: list[Point]) -> Averages:
    """Mean over the images at each setting, in order of rate."""
    groups: dict[str, dict[float, list[Point]]] = {}
    for p in points:
        groups.setdefault(p.codec, {}).setdefault(p.setting, []).append(p)
    result: Averages = {}
    for codec, settings in groups.items():
        rows = [
            {"setting": setting} | {key: float(np.mean([getattr(p, key) for p in part])) for key in ("bpp", *MEASURES)}
            for setting, part in settings.items()
        ]
        result[codec] = sorted(rows, key=lambda row: row["bpp"])
    return result


def curve(rows: list[dict[str, float]], measure: str) -> Curve | None:
    """Curve of an average, None for a single setting; MS-SSIM on its usual scale, -10 log10(1 - MS-SSIM) dB."""
    if len(rows) < 2:
        return None
    values = np.array([row[measure] for row in rows])
    if measure == "ms_ssim":
        values = -10 * np.log10(1 - values)
    return Curve([row["bpp"] for row in rows], values)


def compare(points: list[Point], averages: Averages, published: Averages, ours: str = OURS) -> list[dict[str, Any]]:
    """BD-rate of ours against everything else, in each measure that both have, and as mean over the images."""
    rows = []
    per_image = _by_image(points)
    for name, theirs in [(k, v) for k, v in averages.items() if k != ours] + list(published.items()):
        row: dict[str, Any] = {"codec": name, "published": name in published}
        for measure in MEASURES:
            known = all(np.isfinite(r.get(measure, np.nan)) for r in [*averages[ours], *theirs])
            curves = (curve(theirs, measure), curve(averages[ours], measure)) if known else (None, None)
            row[measure] = bd_rate(*curves) if None not in curves else float("nan")
        pairs = [(them, per_image[ours][image]) for image, them in per_image.get(name, {}).items()]
        row["per_image"] = float(np.mean([bd_rate(*p) if None not in p else float("nan") for p in pairs] or [np.nan]))
        rows.append(row)
    return rows


def _by_image(points: list[Point]) -> dict[str, dict[str, Curve | None]]:
    """Curve of PSNR RGB of every codec and image."""
    rows: dict[str, dict[str, list[dict[str, float]]]] = {}
    for p in points:
        rows.setdefault(p.codec, {}).setdefault(p.image, []).append({"bpp": p.bpp, "psnr_rgb": p.psnr_rgb})
    return {
        codec: {image: _curve_of_image(points) for image, points in images.items()} for codec, images in rows.items()
    }


def _curve_of_image(rows: list[dict[str, float]]) -> Curve | None:
    try:
        return curve(rows, "psnr_rgb")
    except ValueError:  # a search for rates may end at one quality for all
        return None


def read_published(path: str) -> Averages:
    """Read published curves by their legend names; only where PSNR or MS-SSIM comes with the rate."""
    with open(path) as file:
        codecs = json.load(file)["codecs"]
    result: Averages = {}
    for key, legend in PUBLISHED.items():
        if key in codecs:
            entry = codecs[key]
            columns = {"bpp": entry["bpp"], "psnr_rgb": entry.get("psnr_rgb"), "ms_ssim": entry.get("ms_ssim_rgb")}
            present = {name: values for name, values in columns.items() if values}
            result[legend] = [dict(zip(present, row, strict=True)) for row in zip(*present.values(), strict=True)]
    return result


def settings_table(averages: Averages) -> str:
    """Every average, as measured."""
    header = ["codec", "setting", "bpp", "PSNR RGB dB", "PSNR luma dB", "MS-SSIM"]
    rows = [
        [codec, f"{r['setting']:g}", f"{r['bpp']:.4f}", r["psnr_rgb"], r["psnr_luma"], f"{r['ms_ssim']:.4f}"]
        for codec, part in averages.items()
        for r in part
    ]
    return table(header, rows)


def rates_table(averages: Averages) -> str:
    """PSNR RGB in dB at round rates, read off each curve."""
    rates = (0.25, 0.5, 1.0, 1.5)
    curves = {codec: curve(rows, "psnr_rgb") for codec, rows in averages.items()}
    return table(
        ["PSNR RGB dB at", *(f"{rate:g} bpp" for rate in rates)],
        [[codec, *(c.quality_at(rate) if c else float("nan") for rate in rates)] for codec, c in curves.items()],
    )


def comparison_table(comparison: list[dict[str, Any]], ours: str = OURS) -> str:
    """BD-rates in percent."""
    header = [f"BD-rate of {ours} in % against", "RGB", "luma", "MS-SSIM", "RGB, image by image"]
    columns = (*MEASURES, "per_image")
    rows = [[r["codec"] + (" (published)" if r["published"] else ""), *(r[m] for m in columns)] for r in comparison]
    return table(header, rows)


def conclusion(comparison: list[dict[str, Any]]) -> str:
    """Say in one sentence what the run shows."""
    peers = [r for r in comparison if not r["published"] and not r["codec"].startswith(OURS)]
    rated = [r for r in peers if np.isfinite(r["psnr_rgb"])]
    if not rated:
        return "Conclusion: nothing to compare in this run."

    def names(test: Callable[[float], bool]) -> str:
        return ", ".join(f"{r['codec']} ({r['psnr_rgb']:+.1f} %)" for r in rated if test(r["psnr_rgb"])) or "none"

    return (
        f"Conclusion: over {BPP_RANGE[0]} to {BPP_RANGE[1]} bpp at equal PSNR in RGB, {OURS} needs fewer bits than: "
        f"{names(lambda x: x < 0)}; and more than: {names(lambda x: x >= 0)}."
    )


def write_csv(path: str, averages: Averages) -> None:
    """Averages, one row per codec and setting."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["codec", "setting", "bpp", *MEASURES])
        writer.writeheader()
        writer.writerows({"codec": codec, **row} for codec, rows in averages.items() for row in rows)


def write_json(
    path: str,
    where: str,
    points: list[Point],
    averages: Averages,
    comparisons: dict[str, list[dict[str, Any]]],
) -> None:
    """Everything, per image too."""
    document = {
        "machine": where,
        "bd_rate_bpp_range": BPP_RANGE,
        "averages": averages,
        "bd_rate": comparisons[OURS],
        "bd_rate_by_rate": comparisons[BY_RATE],
        "bd_rate_by_effort": {k: v for k, v in comparisons.items() if k not in (OURS, BY_RATE)},
        "images": [asdict(p) for p in points],
    }
    with open(path, "w") as file:
        json.dump(finite(document), file, indent=1, allow_nan=False)


def plot(path: str, averages: Averages, published: Averages, title: str) -> None:
    """PSNR and MS-SSIM over rate; published curves as thin grey lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for axis, measure in zip(axes, ("psnr_rgb", "ms_ssim"), strict=True):

        def values(rows: list[dict[str, float]], measure: str = measure) -> list[float]:
            return [r[measure] if measure == "psnr_rgb" else -10 * float(np.log10(1 - r[measure])) for r in rows]

        for style, (name, rows) in enumerate(published.items()):
            if measure in rows[0]:
                thin = {"color": "0.6", "lw": 0.8, "ls": ["-", "--", "-.", ":", (0, (1, 4))][style % 5]}
                axis.plot([r["bpp"] for r in rows], values(rows), label=f"{name} (published)", **thin)
        for name, rows in averages.items():
            ours = name == OURS
            axis.plot(
                [r["bpp"] for r in rows],
                values(rows),
                ".-",
                lw=2.6 if ours else 1.2,
                label=name,
                color="black" if ours else None,
                zorder=3 if ours else 2,
            )
        axis.set(xlim=(0, BPP_RANGE[1] + 0.2), xlabel="bits per pixel", ylabel=_LABELS[measure], title=title)
        visible = [
            v
            for rows in averages.values()
            for r, v in zip(rows, values(rows), strict=True)
            if 0.1 < r["bpp"] < BPP_RANGE[1] + 0.2 and np.isfinite(v)
        ]
        if visible:
            axis.set_ylim(min(visible) - 0.5, max(visible) + 0.5)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


_LABELS = {"psnr_rgb": "PSNR (RGB), dB", "ms_ssim": "MS-SSIM, -10 log10(1 - x), dB"}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rd", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", required=True, help="folder of lossless images, such as Kodak")
    parser.add_argument("--qualities", type=float, nargs="+", default=QUALITIES, help="of DeepSIC, 1 to 100")
    text = "also at such bits per pixel for every image, as a curve of its own"
    parser.add_argument("--rates", type=float, nargs="*", default=[], metavar="BPP", help=text)
    parser.add_argument("--model", default="base")
    parser.add_argument("--semantics", choices=("pre", "post", "none"), default="pre")
    text = "what DeepSIC codes images as (default: features, those of the model)"
    parser.add_argument("--transform", choices=("auto", "features", "wavelet"), default="features", help=text)
    text = "also with such levels of the encoder's effort (0 to 4), or tuned (3:ms-ssim), as curves of their own"
    parser.add_argument("--efforts", type=_effort_and_tune, nargs="+", default=[], metavar="N[:TUNE]", help=text)
    text = "also with other models, as curves of their own"
    parser.add_argument("--beside", nargs="+", default=[], metavar="MODEL", help=text)
    parser.add_argument(
        "--codecs",
        nargs="*",
        choices=list(PEERS),
        default=list(PEERS),
        metavar="PEER",
        help="peers to run: " + ", ".join(PEERS),
    )
    parser.add_argument("--no-deepsic", action="store_true", help="peers only")
    parser.add_argument("--published", help="JSON file of published curves, drawn as thin lines")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--batch", type=int, default=4, help="images per call of DeepSIC")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--csv", help="write the averages here")
    parser.add_argument("--json", help="write everything here")
    parser.add_argument("--png", help="write the plot here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
