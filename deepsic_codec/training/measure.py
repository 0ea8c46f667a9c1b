"""Figures on held-out training data."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepsic_codec.training.loss import Networks, cell_logits
from deepsic_codec.training.run import Run, make_networks

#: Qualities at which held-out data is measured.
QUALITIES = (15.0, 35.0, 55.0, 80.0)
#: Held-out photographs that are measured, and their largest edge in pixels.
MAX_PHOTOS, MAX_EDGE = 12, 768


@torch.no_grad()
def measure(run: Run, state: dict[str, Tensor], quantised: bool) -> list[dict[str, Any]]:
    """Measure networks on held-out data.

    Parameters
    ----------
    run : Run
        Its data and its kind of networks.
    state : dict of str to Tensor
        Weights to measure.
    quantised : bool
        Whether the prior imitates its integer form.

    Returns
    -------
    list of dict
        For each quality, as far as the data allow: estimated rate in bits per pixel, PSNR in dB, accuracy from float
        latents (`pre`) and from stored ones (`post`).
    """
    s = run.settings
    with torch.random.fork_rng(devices=[]):  # measuring must not change what training draws next
        nets = make_networks(run.nets.arch).to(run.device).eval()
    nets.load_state_dict(state)
    nets.integer, nets.bounded = run.nets.integer, run.nets.bounded
    rows = []
    for quality in [q for q in QUALITIES if s.quality_low <= q <= s.quality_high] or [s.quality_low]:
        row: dict[str, Any] = {"quality": quality}
        if run.photos:
            row |= _rate_and_psnr(run, nets, quality, quantised)
        if run.tiles:
            row |= {
                "pre": accuracy(run, nets, quality, stored=False),
                "post": accuracy(run, nets, quality, stored=True),
            }
        rows.append(row)
    return rows


def _rate_and_psnr(run: Run, nets: Networks, quality: float, quantised: bool) -> dict[str, float]:
    rates, decibels = [], []
    assert run.photos is not None
    for image in run.photos.held_out[:MAX_PHOTOS]:
        height, width = (min(MAX_EDGE, n // 64 * 64) for n in image.shape[:2])
        x = torch.tensor(image[:height, :width], device=run.device).permute(2, 0, 1)[None].float()
        terms = nets.terms(x, torch.full((1,), quality, device=run.device), run.settings.bf16, quantised)
        rates.append(float(terms.rate))
        decibels.append(10 * math.log10(255**2 / max(1e-9, float(terms.distortion))))
    psnr = {"psnr": float(np.mean(decibels))}
    return psnr | {"bpp": float(np.mean(rates))} if run.estimates_rate else psnr


@torch.no_grad()
def accuracy(run: Run, nets: Networks, quality: float, stored: bool) -> float:
    """Return the share of held-out tiles whose best label is right.

    Labels come from float latents, or from those of a `stored` chunk. The encoder chooses these once there is a prior
    to choose with; before, they are rounded to the nearest.
    """
    tiles, right = run.tiles, 0
    assert tiles is not None
    for start in range(0, len(tiles.test_labels), 256):
        pixels = tiles.test_pixels[start : start + 256]
        x = torch.from_numpy(pixels).to(run.device).permute(0, 3, 1, 2).float()
        q = torch.full((len(x),), quality, device=run.device)
        y, gain = nets.analysis(x, q), nets.gains(q)
        if stored:
            y = run.chooser.stored(y, q) if run.has_integer_prior else torch.round(y * gain) / gain
        best = cell_logits(nets.head, y, q)[:, 0, 0].argmax(1).cpu().numpy()
        right += int((best == tiles.test_labels[start : start + 256]).sum())
    return right / len(tiles.test_labels)
