"""Measure a model on images, from real payloads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.metrics import errors, luma, ms_ssim, psnr
from deepsic_codec.payload.constants import LABEL_CELL, LATENT_STRIDE

BATCH = 8  # images that are encoded at once
MIN_MS_SSIM_EDGE = 176  # pixels: MS-SSIM has five scales

Image = tuple[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Result:
    """One image at one quality, or the mean over all images at one quality.

    Attributes
    ----------
    image : str
        Name.
    quality : float
        1 to 100.
    nbytes : float
        Bytes of the payload, header and labels included.
    bpp : float
        Bits per pixel.
    psnr, psnr_luma : float
        PSNR in dB over RGB, and of luma, with the peak 255.
    rmse, largest : float
        Root mean square error and largest error over RGB in grey levels.
    ms_ssim : float
        MS-SSIM; NaN for images with an edge below 176 pixels.
    label : str
        True class of a labelled image.
    predicted : str
        Class with the highest score; empty without labels.
    top1 : float
        1 if `predicted` is `label`, else 0; NaN without labels. The mean is over labelled images.
    """

    image: str
    quality: float
    nbytes: float
    bpp: float
    psnr: float
    psnr_luma: float
    rmse: float
    largest: float
    ms_ssim: float
    label: str = ""
    predicted: str = ""
    top1: float = nan


def evaluate(
    images: Sequence[Image], model: str, quality: float, semantics: str = "pre", labelled: bool = False, **options: Any
) -> Iterator[Result]:
    """Encode and decode images at one quality, each as one chunk.

    Parameters
    ----------
    images : sequence of (str, uint8 array (H, W, 3))
        Names and pixels.
    model : str
        Name of a model.
    quality : float
        1 to 100.
    semantics : {"pre", "post", "none"}
        When labels are computed.
    labelled : bool
        Whether the folder in the name of an image is its true class.
    **options
        Further parameters of `DeepSIC`, such as `effort`.
    """
    from deepsic_codec.codec.v2 import DeepSIC

    codec = DeepSIC(model=model, quality=quality, semantics=semantics, transform="features", **options)
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        payloads = codec.encode_batch([pixels for _, pixels in batch])
        decoded = codec.decode_batch(payloads)
        for (name, pixels), payload, output in zip(batch, payloads, decoded, strict=True):
            height, width = pixels.shape[:2]
            label = Path(name).parent.name if labelled else ""
            predicted = best_label(payload, model) if labelled and semantics != "none" else ""
            yield Result(
                image=name,
                quality=quality,
                nbytes=len(payload),
                bpp=8 * len(payload) / (height * width),
                psnr=psnr(pixels, output),
                **dict(zip(("rmse", "largest"), errors(pixels, output), strict=True)),
                psnr_luma=psnr(luma(pixels), luma(output)),
                ms_ssim=ms_ssim(pixels, output) if min(height, width) >= MIN_MS_SSIM_EDGE else nan,
                label=label,
                predicted=predicted,
                top1=float(predicted == label) if predicted else nan,
            )


def best_label(payload: bytes, model: str) -> str:
    """Return the class with the highest score of any tile, from the label section or else from the features."""
    from deepsic_codec.codec.decode import compute_cells, parse_payload
    from deepsic_codec.model.scheduler import get_scheduler
    from deepsic_codec.model.zoo import find_model
    from deepsic_codec.payload.header import unpack
    from deepsic_codec.payload.sections import LABELS

    info, labels = find_model(model), unpack(payload).read(LABELS)
    names = info.vocabulary.names
    if labels is None:
        scores = compute_cells([parse_payload(payload)], info, get_scheduler(info))[0][..., : len(names)]
    else:
        scores = labels.dense(len(names))
    best = scores.reshape(-1, len(names)).max(0)
    return names[int(best.argmax())] if best.any() else "unknown"


def means(results: Sequence[Result]) -> list[Result]:
    """Return the mean over the images at each quality; NaN does not count."""
    averages = []
    for quality in dict.fromkeys(r.quality for r in results):
        part = [r for r in results if r.quality == quality]
        numbers: dict[str, Any] = {}
        for name in ("nbytes", "bpp", "psnr", "psnr_luma", "rmse", "largest", "ms_ssim", "top1"):
            values = [value for value in (getattr(r, name) for r in part) if not np.isnan(value)]
            numbers[name] = float(np.mean(values)) if values else nan
        label = "all" if part[0].label else ""
        averages.append(Result(image=f"mean of {len(part)}", quality=quality, label=label, **numbers))
    return averages


def complexity(architecture: Any) -> dict[str, float]:
    """Return kMAC per pixel (thousands of multiply-accumulates) of each network of an architecture, and of decoding.

    Integer layers whose inputs or weights have two digits are counted as often as they multiply (`docs/model.md`).
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from deepsic_codec.model.families import family_of
    from deepsic_codec.training.run import make_networks

    networks = make_networks(architecture).eval()
    image, cell = torch.zeros(1, 3, LABEL_CELL, LABEL_CELL), LABEL_CELL // LATENT_STRIDE
    latents = torch.zeros(1, architecture.latents, cell, cell)
    parts: dict[str, float] = {}
    for name, values in {"analysis": image, "prior": latents, "synthesis": latents, "head": latents}.items():
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            getattr(networks, name)(values, torch.ones(1))
        parts[name] = counter.get_total_flops() / 2 / LABEL_CELL**2 / 1e3
    if family_of(architecture).exact:
        latents_at_16 = architecture.latents / LATENT_STRIDE**2 / 1e3
        linear = (
            3 * LATENT_STRIDE**2 * latents_at_16
        )  # the linear paths, of two digits in analysis, of three in synthesis
        parts["analysis"] += linear
        parts["synthesis"] += 2 * linear + latents_at_16 * architecture.synthesis_widths[1]
        parts["head"] += latents_at_16 * architecture.head_width
    return parts | {"decoding": parts["prior"] + parts["synthesis"]}
