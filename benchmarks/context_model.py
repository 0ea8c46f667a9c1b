"""A learned float context model of the same symbols, as a yardstick for the entropy coder.

    python -m benchmarks.context_model --images DIR_OR_ZIP ... --out context.safetensors --minutes 10

A masked 5x5 convolution over all channels (Minnen 2018) and two 1x1 layers predict mean and scale of each symbol from
the 12 positions before it in raster order. The model is trained on the symbols of the given photographs at random
qualities, which it knows. It is a reference for rates only: float arithmetic cannot be decoded reliably, and decoding
position by position would be far too slow.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepsic_codec.model.batch import Scheduler
from deepsic_codec.model.likelihood import scale_of
from deepsic_codec.model.logistic import scale_table
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.training.data import Photographs


class ContextModel(nn.Module):
    """Masked 5x5 convolution, two 1x1 layers, mean and scale index per channel."""

    def __init__(self, latents: int, width: int = 384) -> None:
        super().__init__()
        self.masked = nn.Conv2d(2 * latents, width, 5, padding=2)
        mask = torch.zeros(5, 5)
        mask[:2], mask[2, :2] = 1, 1
        self.register_buffer("mask", mask, persistent=False)
        self.hidden = nn.Conv2d(width + 1, width, 1)
        self.out = nn.Conv2d(width + 1, 2 * latents, 1)
        self.linear = nn.Conv2d(2, 2 * latents, 1)  # of the quality
        self.register_buffer("log_scales", torch.tensor(scale_table(), dtype=torch.float32), persistent=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, symbols: Tensor, quality: Tensor) -> Tensor:
        """Return the bits of each symbol (B, C, h, w) at qualities (B,) from 1 to 100."""
        q = ((quality - 50) / 50)[:, None, None, None].expand(-1, 1, *symbols.shape[2:])
        x = torch.cat([symbols.clamp(-64, 64) / 4, torch.log2(1 + symbols.abs()) / 2], 1)
        h = F.relu(F.conv2d(x, self.masked.weight * self.mask, self.masked.bias, padding=2))
        h = F.relu(self.hidden(torch.cat([h, q], 1)))
        o = self.out(torch.cat([h, q], 1)) + self.linear(torch.cat([q, q * q], 1))
        mean, index = o.chunk(2, 1)
        s = scale_of(index * 8 + 24, self.log_scales)
        d = (symbols - mean).abs()
        mass = torch.sigmoid((0.5 - d) / s) - torch.sigmoid((-0.5 - d) / s)
        return -torch.log2(mass.clamp(min=1e-9))


def load(path: str | Path) -> ContextModel:
    """Load a model that `main` wrote."""
    state = load_file(path)
    model = ContextModel(state["masked.weight"].shape[1] // 2, state["masked.weight"].shape[0])
    model.load_state_dict(state)
    return model.eval()


def symbols_of(runtime: Scheduler, photos: Photographs, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the nearest symbols int16 (count, C, 16, 16) of random crops at random qualities (count,)."""
    rng = np.random.default_rng(seed)
    quality = rng.uniform(1, 100, count).round(2)
    parts = []
    for q in np.array_split(quality, -(-count // 8)):
        pixels = photos.crops(len(q), 256, rng).permute(0, 2, 3, 1).to(torch.uint8).numpy()
        images = [one[None] for one in pixels]
        encoded = runtime.encode(images, q.tolist(), [0] * len(q), features=False, labels=False, symbols=True)
        parts += [one.symbols for one in encoded]
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2), torch.from_numpy(quality).float()


def main() -> None:
    """Train and write the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--crops", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1e-3)
    a = parser.parse_args()
    torch.manual_seed(0)
    runtime = get_scheduler(find_model())
    photos = Photographs(a.images)
    symbols, quality = symbols_of(runtime, photos, a.crops, 1)
    check, check_quality = symbols_of(runtime, photos, 64, 2)
    model = ContextModel(symbols.shape[1])
    adam = torch.optim.Adam(model.parameters(), a.lr)
    start, step, reported = time.monotonic(), 0, 0.0
    while (progress := (time.monotonic() - start) / (60 * a.minutes)) < 1:
        for group in adam.param_groups:
            group["lr"] = a.lr * max(0.01, 0.5 * (1 + math.cos(math.pi * progress)))
        pick = torch.randint(len(symbols), (16,))
        bits = model(symbols[pick].float(), quality[pick]).sum((1, 2, 3)) / 65536
        loss = (bits / (bits.detach() + 0.05)).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        step += 1
        if time.monotonic() - reported > 60:
            reported = time.monotonic()
            with torch.inference_mode():
                check_bits = float(model(check.float(), check_quality).sum()) / (65536 * len(check))
            print(f"step {step}, {reported - start:.0f} s: held out {check_bits:.4f} bpp", flush=True)
    save_file(model.state_dict(), a.out)


if __name__ == "__main__":
    main()
