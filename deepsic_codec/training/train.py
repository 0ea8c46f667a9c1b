r"""Train a DeepSIC model: joint rate, distortion and semantics (phase 1 of 2).

    python -m deepsic_codec.training.train --images photos-0.zip photos-1.zip \
        --labels eurosat-train-0.zip eurosat-train-1.zip --out runs/base --minutes 80

Every image of a batch gets its own random quality, so one run covers all of them.  The
second phase (``deepsic_codec.training.finish``) fits the integer prior and the entropy
coder's tables to the trained transforms and writes the model file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepsic_codec.model.networks import QUALITY_MAX, QUALITY_MIN, Architecture
from deepsic_codec.training.data import LabelledTiles, Photographs
from deepsic_codec.training.klt import linear_start
from deepsic_codec.training.loss import Networks, cell_logits, forward_terms, rate_distortion, semantic


@dataclass
class Settings:
    """All choices of a run."""

    images: list[str] = field(default_factory=list)  # folders or zip files of photographs
    labels: list[str] = field(default_factory=list)  # the same with <Class>/<image> inside
    out: str = "runs/base"
    start: str = ""  # a run to begin with instead of the linear start
    minutes: float = 80.0  # the schedule ends when either of these does
    steps: int = 1_000_000
    photos_per_step: int = 6
    mosaics_per_step: int = 2  # of 4x4 labelled tiles
    crop: int = 256
    lr: float = 8e-4  # Adam, cosine decay to 1 % after a short warm-up
    linear_lr: float = 0.1  # factor for the KLT shortcuts, whose entries are small and good already
    prior_lr: float = 2.0  # factor for the prior, which follows the transforms
    clip: float = 1.0
    ema: float = 0.999
    semantic_weight: float = 0.05  # lambda2
    bf16: bool = True
    device: str = "cpu"
    threads: int = 0  # 0: torch's choice
    every: int = 250  # steps between log lines
    checkpoint_minutes: float = 4.0
    seed: int = 0


def train(s: Settings, arch: Architecture) -> Networks:
    """Run the schedule; returns the averaged networks."""
    torch.manual_seed(s.seed)
    rng = np.random.default_rng(s.seed)
    if s.threads:
        torch.set_num_threads(s.threads)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    photos, tiles = Photographs(s.images), LabelledTiles(s.labels)
    nets = Networks(arch).to(s.device, memory_format=torch.channels_last)
    if s.start:
        nets.load_state_dict(load_file(Path(s.start) / "ema.safetensors"))
    else:
        linear_start(photos, nets.analysis, nets.synthesis, nets.gains, nets.prior)
    linear = [nets.analysis.linear.weight, nets.synthesis.linear.weight]
    prior = list(nets.prior.parameters())
    other = [p for p in nets.parameters() if all(p is not q for q in linear + prior)]
    factors = (1, s.linear_lr, s.prior_lr)
    adam = torch.optim.Adam([{"params": p} for p in (other, linear, prior)], lr=s.lr)
    shadow = {k: v.detach().clone() for k, v in nets.state_dict().items()}
    (out / "settings.json").write_text(json.dumps({"settings": asdict(s), "architecture": arch.to_json()}, indent=1))
    start, saved, step = time.monotonic(), time.monotonic(), 0
    history: list[Tensor] = []
    while True:
        progress = max(step / s.steps, (time.monotonic() - start) / (60 * s.minutes))
        if progress >= 1:
            break
        rate = max(0.01, 0.5 * (1 + math.cos(math.pi * progress))) * min(1.0, (step + 1) / 200)
        for group, factor in zip(adam.param_groups, factors, strict=True):
            group["lr"] = s.lr * rate * factor
        # labelled tiles sometimes stand alone and sometimes inside a larger image
        mosaic, labels = tiles.mosaics(*((s.mosaics_per_step, 4) if step % 2 else (16 * s.mosaics_per_step, 1)), rng)
        crops = photos.crops(s.photos_per_step, s.crop, rng)
        loss, seen = torch.zeros(()), []
        adam.zero_grad(set_to_none=True)
        for pixels, target, share in ((crops, None, 0.75), (mosaic, labels, 0.25)):
            x = torch.from_numpy(pixels).to(s.device).permute(0, 3, 1, 2).float()
            q = torch.rand(len(x), device=s.device) * (QUALITY_MAX - QUALITY_MIN) + QUALITY_MIN
            terms = forward_terms(nets, x, q, s.bf16)
            if target is None:
                goal = torch.full(terms.logits.shape[:3], arch.classes - 1, device=s.device)
            else:
                goal = torch.from_numpy(target).to(s.device)
            sem = semantic(terms.logits, goal)
            part = share * rate_distortion(terms, q) + s.semantic_weight * (0.3 if target is None else 1) * sem
            part.backward()
            loss = loss + part.detach()
            seen += [terms.rate.mean().detach(), terms.distortion.mean().detach(), sem.detach()]
        norm = torch.nn.utils.clip_grad_norm_(nets.parameters(), s.clip)
        if torch.isfinite(norm):
            adam.step()
        step += 1
        decay = min(s.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(shadow.values()), list(nets.state_dict().values()), 1 - decay)
        history.append(torch.stack([loss, *seen, norm.detach()]))
        if step % s.every == 0:
            m = torch.stack(history).mean(0).tolist()
            history.clear()
            minutes = (time.monotonic() - start) / 60
            print(
                f"{step:6d} {minutes:6.1f} min  loss {m[0]:.4f}  photo {m[1]:.3f} bpp mse {m[2]:6.1f} sem {m[3]:.3f}"
                f"  tiles {m[4]:.3f} bpp mse {m[5]:6.1f} sem {m[6]:.3f}  grad {m[7]:.2f}  lr {rate * s.lr:.1e}",
                flush=True,
            )
        if time.monotonic() - saved > 60 * s.checkpoint_minutes:
            saved = time.monotonic()
            save_checkpoint(shadow, out / "ema.safetensors")
            report(shadow, arch, photos, tiles, s)
    save_checkpoint(shadow, out / "ema.safetensors")
    report(shadow, arch, photos, tiles, s)
    return nets


def save_checkpoint(state: dict[str, Tensor], path: Path) -> None:
    """Write atomically, so that an interrupted run keeps the checkpoint before."""
    save_file({k: v.contiguous() for k, v in state.items()}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_networks(run: str | Path) -> Networks:
    """Networks of a run's folder, in evaluation mode."""
    run = Path(run)
    arch = Architecture.from_json(json.loads((run / "settings.json").read_text())["architecture"])
    nets = Networks(arch)
    nets.load_state_dict(load_file(run / "ema.safetensors"))
    return nets.eval()


@torch.no_grad()
def report(
    state: dict[str, Tensor], arch: Architecture, photos: Photographs, tiles: LabelledTiles, s: Settings
) -> None:
    """Print estimated rate, PSNR and accuracy on held-out training data."""
    nets = Networks(arch).to(s.device).eval()
    nets.load_state_dict(state)
    line = []
    for quality in (15.0, 35.0, 55.0, 80.0):
        bpp, psnr = [], []
        for image in photos.held_out[:12]:
            x = torch.tensor(image[: image.shape[0] // 64 * 64, : image.shape[1] // 64 * 64], device=s.device)
            terms = forward_terms(nets, x.permute(2, 0, 1)[None].float(), torch.full((1,), quality), s.bf16)
            bpp.append(float(terms.rate))
            psnr.append(10 * math.log10(255**2 / float(terms.distortion)))
        x = torch.from_numpy(tiles.test_pixels).to(s.device).permute(0, 3, 1, 2).float()
        q = torch.full((len(x),), quality)
        y = nets.analysis(x, q)
        g = nets.gains(q)
        found = cell_logits(nets.head, torch.round(y * g) / g, q)[:, 0, 0].argmax(1).cpu().numpy()
        right = np.mean(found == tiles.test_labels)
        line.append(f"q{quality:.0f} {np.mean(bpp):.3f} bpp {np.mean(psnr):.2f} dB {right:.3f}")
    print("  held out: " + " | ".join(line), flush=True)


def main() -> None:
    """Command line: every field of :class:`Settings` is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    for name, value in asdict(defaults).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, list):
            parser.add_argument(option, nargs="+", default=value)
        elif isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=type(value), default=value)
    train(Settings(**vars(parser.parse_args())), Architecture())


if __name__ == "__main__":
    main()
