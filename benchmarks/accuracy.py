"""Labels against rate: top-1 and top-5 of DeepSIC, pre and post, and of networks trained on the raw pixels.

    python -m benchmarks.accuracy --train TRAINING_0 TRAINING_1 \
        --data EUROSAT_VAL --photos KODAK --minutes 10 --json accuracy.json

The table of the paper (Table I) on tiles of 64x64 pixels, each a chunk of its own; bits per pixel are those of whole
payloads, header and labels included.  *In mosaics* is top-1 where the tiles are parts of chunks of 256x256.  ResNet-18
and our own trunk (analysis and semantic head, trained for nothing but labels) see the pixels, with the same tiles and
augmentation.  *Unknown* is the share of 64x64 cells of photographs that are called unknown.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.common import Pixels, machine, read_images, table
from benchmarks.resnet import ResNet18
from deepsic_codec import DeepSIC, config
from deepsic_codec.cli.console import finite
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.batch import Scheduler
from deepsic_codec.model.file import read_info
from deepsic_codec.model.networks import Analysis, SemanticHead
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.payload.header import read_header
from deepsic_codec.training.data import LabelledTiles
from deepsic_codec.training.data import read_images as read_tiles

QUALITIES = (10.0, 20.0, 35.0, 50.0, 65.0, 80.0, 95.0)
TILE, BATCH = 64, 256


@dataclass(frozen=True)
class Row:
    """One network at one rate."""

    network: str
    quality: float  # NaN for networks on raw pixels
    bpp: float
    top1: float
    top5: float
    mosaic_top1: float
    mosaic_bpp: float
    unknown: float  # share of the cells of photographs


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    a = _arguments(argv)
    print(machine(torch.get_num_threads()))
    name = a.model
    if Path(name).is_file():
        config.set(model_path=name)
        name = read_info(name).name
    info = find_model(name)
    classes = list(info.vocabulary.classes)
    tiles, labels = read_validation(a.data, classes, a.limit)
    photos = [x for _, x in read_images(a.photos)] if a.photos else []
    print(
        f"{info.name}, decoder {info.decoder[:16]}, head {info.head[:16]}; {len(tiles)} tiles of {len(classes)} "
        f"classes, {len(photos)} photographs\n"
    )
    rows = [row for q in a.qualities for row in measure(get_scheduler(info), name, q, tiles, labels, photos)]
    if a.minutes > 0 and a.train:
        rows += raw_networks(a, classes, tiles, labels)
    header = ["network", "quality", "bpp", "top-1 %", "top-5 %", "in mosaics: bpp", "top-1 %", "unknown %"]
    print(
        table(
            header,
            [
                [
                    r.network,
                    r.quality,
                    r.bpp,
                    100 * r.top1,
                    100 * r.top5,
                    r.mosaic_bpp,
                    100 * r.mosaic_top1,
                    100 * r.unknown,
                ]
                for r in rows
            ],
        )
    )
    print("\n" + conclusion(rows))
    if a.csv:
        with open(a.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(r) for r in rows)
    if a.json:
        document = {"machine": machine(torch.get_num_threads()), "rows": [asdict(r) for r in rows]}
        Path(a.json).write_text(json.dumps(finite(document), indent=1))
    if a.png:
        plot(a.png, rows)


def read_validation(source: str, classes: list[str], limit: int | None) -> tuple[Pixels, NDArray[np.int64]]:
    """Tiles (N,64,64,3) of ``<Class>/<image>`` and their classes (N,); evenly thinned to ``limit``."""
    named = [(Path(n).parent.name, x) for n, x in read_tiles(source)]
    foreign = sorted({n for n, _ in named} - set(classes))
    if foreign:
        raise SystemExit(f"{source}: classes that the model does not know: {', '.join(foreign)}")
    if limit and limit < len(named):
        named = [named[i * len(named) // limit] for i in range(limit)]
    return np.stack([x for _, x in named]), np.array([classes.index(n) for n, _ in named])


def measure(
    runtime: Scheduler, model: str, quality: float, tiles: Pixels, labels: NDArray[np.int64], photos: list[Pixels]
) -> list[Row]:
    """Pre and post at one quality."""
    mosaics, pick = _mosaics(tiles, 4)
    rows = []
    for semantics in ("pre", "post"):
        bpp, scores = encode(runtime, model, quality, semantics, list(tiles))
        mosaic_bpp, mosaic_scores = encode(runtime, model, quality, semantics, mosaics)
        _, photo_scores = encode(runtime, model, quality, semantics, photos)
        top1, top5 = top_k(np.concatenate([s.reshape(1, -1) for s in scores]), labels)
        inside = np.concatenate([s.reshape(-1, s.shape[-1]) for s in mosaic_scores])
        unknown = [s.reshape(-1, s.shape[-1]).argmax(1) == s.shape[-1] - 1 for s in photo_scores]
        rows.append(
            Row(
                f"DeepSIC {semantics}",
                quality,
                bpp,
                top1,
                top5,
                top_k(inside, labels[pick])[0],
                mosaic_bpp,
                float(np.concatenate(unknown).mean()) if unknown else math.nan,
            )
        )
    return rows


def encode(
    runtime: Scheduler, model: str, quality: float, semantics: str, images: list[Pixels]
) -> tuple[float, list[NDArray[np.uint8]]]:
    """Bits per pixel of whole payloads, and the scores (rows,columns,classes + 1) of every image's 64x64 cells."""
    codec = DeepSIC(model=model, quality=quality, semantics=semantics, transform="features")
    nbytes, scores, classes = 0, [], len(find_model(model).vocabulary.names)
    for k in range(0, len(images), BATCH):
        part = images[k : k + BATCH]
        payloads = codec.encode_batch(part)
        nbytes += sum(map(len, payloads))
        if semantics == "pre":
            scores += [
                e.cells[0][..., :classes] for e in runtime.encode([x[None] for x in part], [quality] * len(part))
            ]
        else:
            shapes, quantisers = [(1, *x.shape[:2]) for x in part], [read_header(p).quantiser for p in payloads]
            symbols = [codec.decode_features(p) for p in payloads]
            scores += [c[0][..., :classes] for c in runtime.score(symbols, shapes, quantisers)]
    return 8 * nbytes / max(1, sum(x.shape[0] * x.shape[1] for x in images)), scores


def raw_networks(a: argparse.Namespace, classes: list[str], tiles: Pixels, labels: NDArray[np.int64]) -> Iterator[Row]:
    """Networks that see the pixels, trained for ``a.minutes`` each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = LabelledTiles(a.train, device=device)
    if data.classes != classes:
        raise SystemExit(f"classes of --train {data.classes} are not those of the model {classes}")
    arch = Architecture(classes=len(classes))
    networks: dict[str, Callable[[], nn.Module]] = {
        "ResNet-18": lambda: ResNet18(len(classes)),
        "ResNet-18, fine stem": lambda: ResNet18(len(classes), small=True),
        "own trunk, raw pixels": lambda: Trunk(arch),
    }
    for name in a.networks:
        torch.manual_seed(0)
        net = networks[name]().to(device, memory_format=torch.channels_last)
        steps = fit(net, data, a.minutes, a.steps, a.batch, a.lr)
        scores = []
        with torch.no_grad():
            for k in range(0, len(tiles), BATCH):
                x = torch.from_numpy(tiles[k : k + BATCH]).to(device).permute(0, 3, 1, 2).float()
                scores.append(net(x).float().cpu().numpy())
        top1, top5 = top_k(np.concatenate(scores), labels)
        print(f"{name}: {steps} steps of {a.batch}, top-1 {100 * top1:.2f} %")
        yield Row(name, math.nan, 24.0, top1, top5, math.nan, math.nan, math.nan)


class Trunk(nn.Module):
    """Analysis transform and semantic head, for labels alone."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.analysis, self.head = Analysis(arch), SemanticHead(arch)
        nn.init.normal_(self.analysis.out.weight, std=0.05)  # no linear start here that a zero would protect

    def forward(self, x: Tensor) -> Tensor:
        """(B,3,64,64) in 0..255 -> (B,classes) logits."""
        quality = x.new_full((len(x),), 50.0)
        return self.head(self.analysis(x, quality), quality)


def fit(net: nn.Module, data: LabelledTiles, minutes: float, steps: int, batch: int, lr: float) -> int:
    """Train on cross-entropy with AdamW and cosine decay; returns the steps taken."""
    adam = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    rng, start, step = np.random.default_rng(0), time.monotonic(), 0
    net.train()
    while (progress := max((time.monotonic() - start) / (60 * minutes), step / steps)) < 1:
        for group in adam.param_groups:
            group["lr"] = lr * max(0.01, 0.5 * (1 + math.cos(math.pi * progress))) * min(1, (step + 1) / 100)
        x, target = data.mosaics(batch, 1, rng)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), target.reshape(-1), label_smoothing=0.05)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        step += 1
    net.eval()
    return step


def top_k(scores: NDArray[np.generic], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Share of rows whose label is the best and among the five best; equal scores by class number."""
    order = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")
    return float((order[:, 0] == labels).mean()), float((order[:, :5] == labels[:, None]).any(1).mean())


def conclusion(rows: list[Row]) -> str:
    """Say in one sentence what the run shows."""
    ours = [r for r in rows if r.bpp < 24]
    best = max(ours, key=lambda r: r.top1)
    text = f"Conclusion: {best.network} reaches {100 * best.top1:.1f} % top-1 at {best.bpp:.2f} bpp"
    raw = [r for r in rows if r.bpp == 24]
    text += "".join(f"; {r.network} on the raw pixels {100 * r.top1:.1f} %" for r in raw)
    return text + "."


def plot(path: str, rows: list[Row]) -> None:
    """Top-1 over rate, the raw networks as horizontal lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for name in dict.fromkeys(r.network for r in rows):
        part = sorted((r for r in rows if r.network == name), key=lambda r: r.bpp)
        if part[0].bpp == 24:
            axis.axhline(100 * part[0].top1, lw=0.8, ls="--", color="0.5")
            axis.annotate(name, (0.01, 100 * part[0].top1), xycoords=("axes fraction", "data"), fontsize=8)
        else:
            axis.plot([r.bpp for r in part], [100 * r.top1 for r in part], ".-", label=name)
    axis.set(xlabel="bits per pixel", ylabel="top-1, %")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _mosaics(tiles: Pixels, edge: int) -> tuple[list[Pixels], NDArray[np.int64]]:
    """Tiles in random order as images of edge x edge of them, and which tile each cell is; leaves out a remainder."""
    order = np.random.default_rng(0).permutation(len(tiles))
    order = order[: len(order) // edge**2 * edge**2]
    parts = tiles[order].reshape(-1, edge, edge, TILE, TILE, 3).transpose(0, 1, 3, 2, 4, 5)
    return list(parts.reshape(-1, edge * TILE, edge * TILE, 3)), order


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="validation tiles: folder or zip file with <Class>/<image>")
    parser.add_argument("--train", nargs="+", default=[], help="training tiles for the networks on raw pixels")
    parser.add_argument("--photos", help="folder of photographs, none of which shows a class")
    parser.add_argument("--model", default="base", help="name or file")
    parser.add_argument("--qualities", type=float, nargs="+", default=QUALITIES)
    parser.add_argument("--limit", type=int, help="only so many validation tiles")
    raw = ["ResNet-18", "ResNet-18, fine stem", "own trunk, raw pixels"]
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=raw,
        default=[raw[0], raw[2]],
        metavar="NAME",
        help="on raw pixels: " + "; ".join(raw),
    )
    parser.add_argument("--minutes", type=float, default=10, help="training of each; 0: none")
    parser.add_argument("--steps", type=int, default=1_000_000, help="at most")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--csv", help="write the table here")
    parser.add_argument("--json", help="write the table here")
    parser.add_argument("--png", help="write the plot here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
