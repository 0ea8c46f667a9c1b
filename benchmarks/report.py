"""Run the other benchmarks and write what they print on one page, docs/benchmarks.md, with its plots beside it.

    python -m benchmarks.report --images KODAK --tiles EUROSAT_VAL \
        --scenes SCENES
    python -m benchmarks.report --quick --out /tmp/report     # a minute or two, to see that everything works

Sizes are such that two cores need about half an hour. What is not given is taken from the images of the package, and
the page says so: figures from those compare machines and versions, and are not for quoting. The page names machine,
versions, date and every command; folders appear by the names of the options above. A part that fails is named on the
page, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import machine
from deepsic_codec.samples import TILE, drone_frame, eurosat_classes, eurosat_mosaic

ROOT = Path(__file__).parents[1]
PACKAGES = ("numpy", "torch", "numba", "zarr", "numcodecs", "imagecodecs", "pillow", "dask", "xarray", "constriction")


@dataclass(frozen=True)
class Part:
    """A benchmark: heading, what it shows, its arguments in full and for a quick run, and plots that it draws.

    Arguments IMAGES, TILES, SCENES stand for folders or files, PNG for the file of the plot.
    """

    title: str
    shows: str
    full: str
    quick: str
    plot: str | None = None


PARTS = {
    "startup": Part(
        "Starting up",
        "What a new process pays before its first pixel.",
        "--repeats 5",
        "--repeats 1",
    ),
    "rd": Part(
        "Rate and distortion",
        "The same images through every codec, from the bytes that each really writes.",
        "--images IMAGES --efforts 2 3 3:ms-ssim 4 --rates 0.15 0.2 0.3 0.4 0.6 0.8 1 1.25 1.5 --png PNG",
        "--images IMAGES --limit 1 --qualities 20 50 80 --codecs WebP --png PNG",
        "rate-distortion",
    ),
    "throughput": Part(
        "Speed and memory",
        "Chunks of 512 x 512, each codec at about the same PSNR and number of threads.",
        "--repeats 3 --efforts 2 3 4",
        "--chunks 2 --repeats 1",
    ),
    "entropy": Part(
        "Entropy coder",
        "Symbols of real images: bits against the ideal static code, and the speed of one thread.",
        "--images IMAGES",
        "--images IMAGES --qualities 27 --repeat 1",
    ),
    "query": Part(
        "Labels and queries",
        "Queries on a real archive and on a simulated index of a million chunks.",
        "--data TILES --chunks 3600 --expressions 100",
        "--data TILES --chunks 1024 --expressions 10 --repeats 1",
    ),
    "scale": Part(
        "Archives at scale",
        "Memory of the bulk writer, workers, batches, S3 on this machine.",
        "--pixels 20e6",
        "--pixels 2e6 --repeats 1 --parts batch",
    ),
    "accuracy": Part(
        "Labels against rate",
        "How often the best label is right, before and after quantisation.",
        "--data TILES --minutes 0 --limit 2000 --png PNG",
        "--data TILES --minutes 0 --limit 64 --qualities 50 --png PNG",
        "label-accuracy",
    ),
    "imagery": Part(
        "Imagery of other kinds",
        "16 bit, floats, many bands, NoData: error at equal bytes, lossless and bounded error beside other codecs.",
        "--scenes SCENES --bits 0.5 2 --bounds 2",
        "--scenes SCENES --only lossless",
    ),
    "generations": Part(
        "Rewriting",
        "A chunk decoded and encoded again ten times, and a small write into it.",
        "--crop 256",
        "--crop 128 --qualities 50 --errors 2 --count 2",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What a part printed, its exit status, and how long it took."""

    part: Part
    command: str
    output: str
    status: int
    seconds: float
    plot: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts and write the page; returns 1 if a part failed."""
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        sources = {"IMAGES": args.images, "TILES": args.tiles, "SCENES": args.scenes}
        places = {name: str(place) for name, place in sources.items() if place}
        bundled = [name for name in ("IMAGES", "TILES") if name not in places]
        places |= _bundled(Path(temporary), bundled)
        outcomes = []
        for name in args.parts:
            print(f"{name} ...", end=" ", flush=True)
            outcomes.append(run(name, places, args.quick, args.out, args.timeout))
            print(f"{outcomes[-1].seconds:.0f} s" + (" FAILED" if outcomes[-1].status else ""), flush=True)
    page = write(outcomes, bundled, args)
    (args.out / "benchmarks.md").write_text(page)
    print(args.out / "benchmarks.md")
    return int(any(outcome.status for outcome in outcomes))


def run(name: str, places: dict[str, str], quick: bool, out: Path, timeout: float) -> Outcome:
    """Run one part as a command of its own, so that no part profits or suffers from another."""
    part = PARTS[name]
    arguments = part.quick if quick else part.full
    lacking = [word for word in shlex.split(arguments) if word in ("IMAGES", "TILES", "SCENES") and word not in places]
    module = f"benchmarks.{name}"
    if lacking or not (ROOT / "benchmarks" / f"{name}.py").is_file():
        reason = f"needs --{lacking[0].lower()}" if lacking else "this version has no such benchmark"
        return Outcome(part, f"python -m {module} {arguments}", f"Left out: {reason}.", 0, 0.0, None)
    plot = f"benchmarks-{part.plot}.png" if part.plot else None
    words = {**places, "PNG": str(out / plot) if plot else ""}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        module,
        *(words.get(word, word) for word in shlex.split(arguments)),
    ]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)
        status, output = done.returncode, done.stdout
        if status:
            output += f"\nThis part failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    except subprocess.TimeoutExpired:
        status, output = 1, f"This part was stopped after {timeout:.0f} seconds."
    seconds = time.perf_counter() - began
    cpu = machine(1).split(",")[0]  # said once, on top of the page
    output = "\n".join(line for line in output.splitlines() if not line.startswith(cpu))
    for word, place in sorted(words.items(), key=lambda item: -len(item[1])):
        output = output.replace(place, word) if place else output
    text = f"python -m {module} {arguments}".replace("PNG", plot or "")
    return Outcome(part, text, output, status, seconds, plot if plot and (out / plot).is_file() else None)


def write(outcomes: Sequence[Outcome], bundled: Sequence[str], args: argparse.Namespace) -> str:
    """Return the page."""
    known = {dist.metadata["Name"].lower(): dist.version for dist in distributions()}
    versions = ", ".join(f"{name} {known[name]}" for name in PACKAGES if name in known)
    command = "python -m benchmarks.report" + (" --quick" if args.quick else "")
    command += "".join(f" --{name} {name.upper()}" for name in ("images", "tiles", "scenes") if getattr(args, name))
    total = sum(outcome.seconds for outcome in outcomes)
    lines = [
        "# Benchmarks\n",
        f"Written by `{command}` on {datetime.date.today():%d %B %Y}, in {total / 60:.0f} minutes.\n",
        f"- Machine: {machine(os.cpu_count() or 1).split(';')[0]}; load average {os.getloadavg()[0]:.1f} at the end.",
        f"- Versions: {versions}.",
    ]
    if args.quick:
        lines.append("- **A quick run**, to see that the benchmarks work: sizes are too small for any conclusion.")
    if bundled:
        names = " and ".join(name.lower() for name in bundled)
        lines.append(f"- {names.capitalize()} are those that come with the package: not for quoting.")
    for outcome in outcomes:
        lines += [f"\n## {outcome.part.title}\n", f"{outcome.part.shows}\n", f"```bash\n{outcome.command}\n```\n"]
        lines.append(markdown(outcome.output))
        if outcome.plot:
            lines.append(f"\n![{outcome.part.title}]({outcome.plot})")
        if outcome.seconds:
            lines.append(f"\n*{outcome.seconds:.0f} seconds.*")
    return "\n".join(lines) + "\n"


def markdown(output: str) -> str:
    """Turn what a benchmark prints into Markdown: tables stay, headings sink, columns are kept, the rest flows."""
    blocks = []
    for block in re.split(r"\n\s*\n", re.sub(r"(?m)^ +$", "", output.replace("\r", "\n")).strip("\n")):
        lines = [line.rstrip() for line in block.splitlines()]
        pieces: list[list[str]] = []
        for line in lines:  # a table may follow a line of text at once, and Markdown wants them apart
            if pieces and line.lstrip().startswith("|") == pieces[-1][0].lstrip().startswith("|"):
                pieces[-1].append(line)
            else:
                pieces.append([line])
        for piece in pieces:
            if piece[0].lstrip().startswith("|"):
                blocks.append("\n".join(line.lstrip() for line in piece))
            elif piece[0].startswith("#"):
                blocks.append("\n\n".join(re.sub(r"^#+", "###", line) for line in piece))
            elif any(re.search(r"\S {2,}\S", line) or line.startswith("    ") for line in piece):
                blocks.append("```text\n" + "\n".join(piece) + "\n```")
            else:
                blocks.append("\n".join(line.replace("<", "&lt;").replace("*", "\\*") for line in piece))
    return "\n\n".join(blocks)


def _bundled(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Write the images of the package as the benchmarks like to have them; returns where."""
    places = {}
    if "IMAGES" in names:
        (folder / "images").mkdir()
        frame = drone_frame()
        for number, (row, column) in enumerate(np.ndindex(2, 2)):
            crop = frame[768 * row : 768 * row + 512, 1024 * column : 1024 * column + 768]
            Image.fromarray(crop).save(folder / "images" / f"frame-{number}.png")
        places["IMAGES"] = str(folder / "images")
    if "TILES" in names:
        mosaic = eurosat_mosaic()
        for row, names in enumerate(eurosat_classes()):
            for column, name in enumerate(names):
                place = folder / "tiles" / name
                place.mkdir(parents=True, exist_ok=True)
                tile = mosaic[TILE * row : TILE * (row + 1), TILE * column : TILE * (column + 1)]
                # JPEG, as they come from EuroSAT, and hardly different from what they are.
                Image.fromarray(tile).save(place / f"{name}_{16 * row + column}.jpg", quality=100, subsampling=0)
        places["TILES"] = str(folder / "tiles")
    return places


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, help="folder of lossless images, e.g. Kodak (default: the package's)")
    add("--tiles", type=Path, help="zip file or folder of EuroSAT validation tiles (default: the package's)")
    add("--scenes", type=Path, help="folder of TIFF scenes for the part imagery (default: leave it out)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run (default: all)")
    add("--quick", action="store_true", help="sizes that take a minute or two")
    add("--timeout", type=float, default=3600, help="seconds for each part (default: 3600)")
    add("--out", type=Path, default=ROOT / "docs", help="folder of the page (default: docs)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
