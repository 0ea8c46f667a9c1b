"""Measure a model on images, from real payloads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.metrics import luma, ms_ssim, psnr

BATCH_PIXELS = 1 << 22  # images that are encoded at once; bounds memory
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
        PSNR in dB over RGB, and of luma.
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

    codec = DeepSIC(model=model, quality=quality, semantics=semantics, **options)
    for batch in _batches(images):
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
                psnr_luma=psnr(luma(pixels), luma(output)),
                ms_ssim=ms_ssim(pixels, output) if min(height, width) >= MIN_MS_SSIM_EDGE else nan,
                label=label,
                predicted=predicted,
                top1=float(predicted == label) if predicted else nan,
            )


def best_label(payload: bytes, model: str) -> str:
    """Name of the highest score of any tile: from the label section or, without one, from the stored features."""
    from deepsic_codec.model.file import find_model
    from deepsic_codec.model.runtime import get_runtime
    from deepsic_codec.payload.header import FEATURES, LABELS, read_header, read_section
    from deepsic_codec.payload.labels import decode_labels

    header = read_header(payload)
    info = find_model(model)
    names = info.vocabulary.names
    section = read_section(payload, header, LABELS)
    if section is None:
        features, runtime = read_section(payload, header, FEATURES), get_runtime(info)
        shape, quality = (header.slices, header.height, header.width), [header.quality]
        symbols = runtime.decode_symbols([features or b""], [shape], quality)
        scores = runtime.label_symbols(symbols, [shape], quality)[0]
    else:
        scores = decode_labels(section, header).dense(len(names))
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
    from deepsic_codec.model.architecture import stored_networks
    from deepsic_codec.model.networks import Architecture, kmac_per_pixel
    from deepsic_codec.model.prior import input_count, schedule

    arch = runtime.arch
    if not isinstance(arch, Architecture):
        parts = arch.kmac_per_pixel()
        return parts | {"decoding": parts["prior"] + parts["synthesis"]}
    share = {"A": 0.25, "B": 0.25, "C": 0.5, "1": 0.5, "2": 0.5}
    prior = 0.0
    for step in schedule(arch.prior_groups, arch.prior_detail):
        inputs = input_count(step)
        layers = arch.prior_width * (inputs + arch.prior_width + 2 * step.count) if inputs else 0
        prior += share[step.mask] * (layers + step.signed * step.count * len(step.offsets)) / 256
    nets = stored_networks(arch)
    whole: Any = nets["head"]
    head = kmac_per_pixel(whole) + (whole.hidden.weight.numel() + whole.out.weight.numel()) / 4096e3
    parts = {name: kmac_per_pixel(nets[name]) for name in ("analysis", "synthesis")}
    if arch.integer:  # layers of two digits multiply more than once (docs/model.md)
        shortcut = arch.latents * 3 / 1e3
        parts["analysis"] += shortcut
        parts["synthesis"] += 2 * shortcut + arch.latents * arch.synthesis_widths[1] / 256e3
        head += arch.latents * arch.head_width / 256e3
    parts |= {"prior": prior / 1e3, "head": head}
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
