r"""Finish a trained model (phase 2 of 2): integer prior, coder tables, model file.

    python -m deepsic_codec.training.finish --run runs/base --images photos-0.zip photos-1.zip \
        --labels eurosat-train-0.zip eurosat-train-1.zip --model base.safetensors --minutes 12

The transforms stay as they are; the prior is fine-tuned on their rounded symbols while it
imitates its integer form, and the entropy coder's start is fitted to the result.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepsic_codec.model.file import Arrays, Vocabulary, save_model
from deepsic_codec.model.networks import QUALITY_MAX, QUALITY_MIN, SemanticHead
from deepsic_codec.model.prior import IntegerPrior, Prior
from deepsic_codec.model.runtime import Networks as Stored
from deepsic_codec.payload.tables import CoderTables
from deepsic_codec.training.data import LabelledTiles, Photographs
from deepsic_codec.training.loss import Networks, cells_of, semantic
from deepsic_codec.training.tables import Sample, fit_tables, total_bytes
from deepsic_codec.training.train import load_networks


@torch.no_grad()
def collect_symbols(
    nets: Networks, photos: Photographs, tiles: LabelledTiles | None, batches: int, seed: int, crop: int = 256
) -> tuple[Tensor, Tensor]:
    """Rounded symbols int16 (N,C,h,w) of random crops at random qualities (N,); every fifth a mosaic."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    out, qualities = [], []
    for i in range(batches):
        pixels = tiles.mosaics(8, crop // 64, rng)[0] if tiles and i % 5 == 4 else photos.crops(8, crop, rng)
        q = torch.rand(8) * (QUALITY_MAX - QUALITY_MIN) + QUALITY_MIN
        q = (q * 100).round() / 100
        y = nets.analysis(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), q)
        out.append(torch.round(y * nets.gains(q)).clamp(-32767, 32767).to(torch.int16))
        qualities.append(q)
    return torch.cat(out), torch.cat(qualities)


def tune_prior(
    prior: Prior, symbols: Tensor, quality: Tensor, check: tuple[Tensor, Tensor], minutes: float, lr: float = 6e-4
) -> None:
    """Fine-tune the prior on fixed symbols, imitating integers; weighs every quality alike."""
    prior.train()
    adam = torch.optim.Adam(prior.parameters(), lr=lr)
    start, step, shown = time.monotonic(), 0, 0.0
    generator = torch.Generator().manual_seed(0)
    seen = 0.0
    while True:
        progress = (time.monotonic() - start) / (60 * minutes)
        if progress >= 1:
            break
        for group in adam.param_groups:
            group["lr"] = lr * max(0.01, 0.5 * (1 + math.cos(math.pi * progress)))
        pick = torch.randint(len(symbols), (16,), generator=generator)
        x, q = symbols[pick].float(), quality[pick]
        bits = prior.bits(x, *prior(x, q, quantised=True)).sum((1, 2, 3)) / (256 * x.shape[2] * x.shape[3])
        loss = (bits / (bits.detach() + 0.05)).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        adam.step()
        step += 1
        seen += float(bits.detach().mean())
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            held = estimate(prior, *check, True)
            print(f"  prior step {step}: {seen / step:.4f} bpp, held out {held:.4f}", flush=True)
    prior.eval()


@torch.no_grad()
def estimate(prior: Prior, symbols: Tensor, quality: Tensor, quantised: bool) -> float:
    """Mean bits per pixel that the prior's logistic masses promise."""
    bits = 0.0
    for i in range(0, len(symbols), 8):
        x, q = symbols[i : i + 8].float(), quality[i : i + 8]
        bits += float(prior.bits(x, *prior(x, q, quantised)).sum())
    return bits / (symbols.shape[0] * 256 * symbols.shape[2] * symbols.shape[3])


@torch.no_grad()
def collect_cells(
    nets: Networks, photos: Photographs, tiles: LabelledTiles, copies: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents float16 (N,C,4,4) of labelled cells, their classes and qualities (N,).

    Half of the tiles stand alone and half in mosaics, half of the latents are as the analysis
    gives them and half rounded; cells of photographs are *unknown*.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    latents, labels, qualities = [], [], []
    unknown = nets.arch.classes - 1
    for batch in range(copies * len(tiles.labels) // 64):
        if batch % 6 == 5:
            pixels = photos.crops(4, 256, rng)
            found = np.full((4, 4, 4), unknown)
        else:
            pixels, found = tiles.mosaics(*((4, 4) if batch % 2 else (64, 1)), rng)
        q = torch.rand(len(pixels)) * (QUALITY_MAX - QUALITY_MIN) + QUALITY_MIN
        with torch.autocast("cpu", torch.bfloat16):
            y = nets.analysis(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), q)
        gain = nets.gains(q)
        rounded = torch.round(y * gain) / gain
        y = torch.where(torch.rand(len(y), 1, 1, 1) < 0.5, y, rounded)
        latents.append(cells_of(y).half())
        labels.append(torch.from_numpy(found).reshape(-1))
        qualities.append(q.repeat_interleave(found[0].size))
    return torch.cat(latents), torch.cat(labels), torch.cat(qualities)


def tune_head(
    head: SemanticHead, cells: tuple[Tensor, Tensor, Tensor], minutes: float, lr: float = 2e-3
) -> None:
    """Train the semantic head on latents that stay as they are."""
    latents, labels, quality = cells
    head.train()
    adam = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(0)
    start, step, seen, shown = time.monotonic(), 0, 0.0, 0.0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in adam.param_groups:
            group["lr"] = lr * max(0.01, 0.5 * (1 + math.cos(math.pi * progress)))
        pick = torch.randint(len(labels), (256,), generator=generator)
        loss = semantic(head(latents[pick].float(), quality[pick]), labels[pick])
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        adam.step()
        step += 1
        seen = 0.98 * seen + 0.02 * float(loss.detach())
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            print(f"  head step {step}: loss {seen / (1 - 0.98**step):.4f}", flush=True)
    head.eval()


@torch.no_grad()
def accuracy(nets: Networks, tiles: LabelledTiles, quality: float, rounded: bool) -> float:
    """Top-1 accuracy on the held-out tiles of the training set."""
    q = torch.full((len(tiles.test_labels),), quality)
    y = nets.analysis(torch.from_numpy(tiles.test_pixels).permute(0, 3, 1, 2).float(), q)
    if rounded:
        y = torch.round(y * nets.gains(q)) / nets.gains(q)
    return float((nets.head(y, q).argmax(1).numpy() == tiles.test_labels).mean())


def finish(
    run: str, photos: Photographs, tiles: LabelledTiles | None, model: str, minutes: float, head_minutes: float,
    batches: int, parents: dict[str, tuple[str, ...]],
) -> None:  # fmt: skip
    """All steps; prints what each is worth in bits per pixel."""
    nets = load_networks(run)
    symbols, quality = collect_symbols(nets, photos, tiles, batches, 1)
    check = collect_symbols(nets, photos, tiles, max(2, batches // 25), 2)
    print(f"{len(symbols)} crops; float prior as trained: {estimate(nets.prior, *check, False):.4f} bpp held out")
    tune_prior(nets.prior, symbols, quality, check, minutes)
    promised = estimate(nets.prior, *check, True)
    print(f"integer prior: {promised:.4f} bpp held out")
    if tiles and head_minutes:
        tune_head(nets.head, collect_cells(nets, photos, tiles, 4, 3), head_minutes)
        for q in (15.0, 35.0, 55.0, 80.0):
            pre, post = (accuracy(nets, tiles, q, rounded) for rounded in (False, True))
            print(f"head at quality {q:.0f}: top-1 {pre:.3f} pre, {post:.3f} post, on held-out training tiles")
    exported = IntegerPrior.export(nets.prior)
    prior = IntegerPrior(nets.arch, exported)

    def samples(data: tuple[Tensor, Tensor], count: int) -> list[Sample]:
        nhwc = data[0][:count].permute(0, 2, 3, 1).contiguous().numpy()
        return [(nhwc[i : i + 1], float(data[1][i])) for i in range(len(nhwc))]

    start = CoderTables.untrained(nets.arch.latents, nets.prior.log_scales.double().numpy())
    checked = samples(check, 120)
    pixels = sum(s.shape[1] * s.shape[2] * 256 for s, _ in checked)
    print(f"coder, untrained tables: {total_bytes(prior, start, checked) * 8 / pixels:.4f} bpp")
    tables = fit_tables(prior, start, samples((symbols, quality), 600), checked)
    print(f"coder, fitted tables: {total_bytes(prior, tables, checked) * 8 / pixels:.4f} bpp")
    arrays: Arrays = {f"decoder.prior.{k}": v.numpy() for k, v in exported.items()}
    arrays |= {f"decoder.coder.{k}": v for k, v in tables.arrays().items()}
    for name, prefix in Stored.PREFIX.items():
        # half precision: its rounding lies far below that of the latents
        arrays |= {f"{prefix}.{k}": v.half().numpy() for k, v in getattr(nets, name).state_dict().items()}
    vocabulary = Vocabulary(tuple(tiles.classes) if tiles else (), parents)
    info = save_model(model, name_of(model), arrays, nets.arch.to_json(), vocabulary, {"run": run_settings(run)})
    print(f"{model}: decoder {info.decoder[:16]}, head {info.head[:16]}, {Path(model).stat().st_size} bytes")


def name_of(model: str) -> str:
    """Name of a model: that of its file."""
    return Path(model).stem


def run_settings(run: str) -> dict[str, Any]:
    """How the run was trained, without the places of this machine."""
    settings = json.loads((Path(run) / "settings.json").read_text())["settings"]
    return {k: v for k, v in settings.items() if k not in ("out", "start")} | {
        k: [Path(p).name for p in settings[k]] for k in ("images", "labels")
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--labels", nargs="*", default=[])
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=12, help="for the prior")
    parser.add_argument("--head-minutes", type=float, default=6, help="for the semantic head; 0 leaves it as it is")
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--parents", default="{}", help='JSON, for example {"Water": ["River", "SeaLake"]}')
    a = parser.parse_args()
    parents = {k: tuple(v) for k, v in json.loads(a.parents).items()}
    tiles = LabelledTiles(a.labels) if a.labels else None
    finish(a.run, Photographs(a.images), tiles, a.model, a.minutes, a.head_minutes, a.batches, parents)


if __name__ == "__main__":
    main()
