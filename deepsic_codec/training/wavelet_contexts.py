"""Find what the contexts and mixers of wavelets start with, and write it.

    python -m deepsic_codec.training.wavelet_contexts --images photographs.zip --scenes scenes/ \
        --out deepsic_codec/data/wavelet-contexts.txt

Crops are coded as wavelets of several rates. A context starts with the probability, and with as many observations, for
which the bits that it saw in all crops are most likely, if its probability varies between crops as a beta distribution.
Mixers start with a running mean of their weights after each crop. `docs/wavelet.md` has the format of the file.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deepsic_codec.payload.coders.band_contexts import (
    AT,
    INPUTS,
    MIXERS,
    PATTERN_MIXERS,
    WEIGHT_UNIT,
    packed,
    unpacked,
)
from deepsic_codec.payload.coders.subbands import LIMIT, learn
from deepsic_codec.training.wavelet_filter import components_at, crops, read_parts

#: Edges of crops and their shares, and crops of an image.
EDGES, SHARES, CROPS = (64, 128, 256, 512), (0.08, 0.12, 0.35, 0.45), 10
#: Numbers of observations that a context may start with. There are few crops, so it prefers one near the usual number.
STRENGTHS, USUAL = (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, LIMIT), 8
#: Even odds in the state of a context, contexts that are fitted at a time, and largest logit in eighths.
EVEN, BLOCK, LARGEST = 1 << 31, 1 << 11, 66
#: Share of the weights after a crop in the running mean, at the end; weights that all mixers of patterns begin with.
SHARE, WEIGHTS = 0.03, (24000, 20000, 18000, 18000, 0)


class Crop(NamedTuple):
    """Coefficients of a crop, int16 or int32 (1, components, height, width), and the code of a step."""

    coefficients: NDArray[Any]
    code: int


def coded_crops(images: Sequence[NDArray[Any]], rates: Sequence[float], rng: np.random.Generator) -> Iterator[Crop]:
    """Yield crops of images (height,width,bands), each with a rate between the smallest and the largest."""
    for image in images:
        for crop in crops(image, rng, rng.choice(EDGES, CROPS, p=SHARES).tolist(), min(EDGES)):
            rate = float(np.exp(rng.uniform(*np.log((min(rates), max(rates))))))
            for _, coefficients, code in components_at(crop, (rate,)):
                yield Crop(coefficients, code)


def fit_contexts(examples: Sequence[Crop]) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """Return ln(p / (1 - p)) in eighths, and numbers of observations, of all contexts."""
    start = np.full(AT.size, EVEN, np.uint32), first_mixers()
    states = np.stack([learn(one.coefficients.copy(), one.code, start)[0] for one in examples])
    logits, counts = np.zeros(AT.size, np.int8), np.zeros(AT.size, np.uint8)
    for at in range(0, AT.size, BLOCK):
        part = states[:, at : at + BLOCK]
        count = torch.from_numpy((part & 1023).astype(np.float64))
        # A context's probability is that of its bits and of half a one and half a zero, about.
        ones = torch.from_numpy((part >> 10) / 2.0**22) * (count + 0.5) - 0.25
        p, strength = _fit_beta(torch.minimum(ones.clamp(min=0), count), count)
        rows = slice(at, at + BLOCK)
        logits[rows] = (8 * torch.logit(p)).round().clamp(-LARGEST, LARGEST).numpy()
        counts[rows] = (strength - 0.5).round().clamp(0, LIMIT).numpy()
    return logits, counts


def _fit_beta(ones: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return means and strengths (contexts,) of beta distributions, from ones and observations (crops, contexts)."""
    best = torch.full_like(count[0], -torch.inf)
    mean, chosen = torch.full_like(best, 0.5), torch.zeros_like(best)
    for strength in STRENGTHS:
        weight = strength / (count + strength)
        p = ((ones * weight).sum(0) + 0.05) / ((count * weight).sum(0) + 0.1)
        a, b = p * strength, (1 - p) * strength
        likelihood = torch.lgamma(a + ones) - torch.lgamma(a) + torch.lgamma(b + count - ones) - torch.lgamma(b)
        likelihood += torch.lgamma(torch.tensor(float(strength))) - torch.lgamma(strength + count)
        total = likelihood.sum(0) - 0.25 * abs(np.log(strength / USUAL))
        better = (total > best) & (count.sum(0) > 0)
        best, mean = torch.where(better, total, best), torch.where(better, p, mean)
        chosen = torch.where(better, torch.full_like(chosen, strength), chosen)
    return mean, chosen


def first_mixers() -> NDArray[np.int32]:
    """Return weights that mixers begin with before they are trained: those by class of band add nothing."""
    mixers = np.zeros((MIXERS, INPUTS), np.int32)
    mixers[:PATTERN_MIXERS] = WEIGHTS
    return mixers


def fit_mixers(examples: Sequence[Crop], contexts: NDArray[np.uint32]) -> NDArray[np.int16]:
    """Return the weights of mixers, in units of the file, for contexts that start as given."""
    mean = first_mixers().astype(np.float64)
    for number, one in enumerate(examples):
        _, after = learn(one.coefficients.copy(), one.code, (contexts, np.rint(mean).astype(np.int32)))
        mean += max(SHARE, 0.5 / (number + 1.5)) * (after - mean)
    return np.rint(mean / WEIGHT_UNIT).astype(np.int16)


def main(argv: Sequence[str] | None = None) -> None:
    """Find the start of contexts and mixers and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", required=True, help="photographs without coding loss")
    parser.add_argument("--scenes", nargs="+", required=True, help="files of other imagery, of any depth and bands")
    parser.add_argument("--out", required=True, help="file of contexts and mixers")
    arguments = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    examples: list[Crop] = []
    for images, rates in read_parts(arguments.images, arguments.scenes):
        before = len(examples)
        examples += coded_crops(images, rates, rng)
        print(f"{len(examples) - before} crops of {len(images)} images", flush=True)
    examples = [examples[number] for number in rng.permutation(len(examples))]
    logits, counts = fit_contexts(examples)
    print("contexts are fitted", flush=True)
    none = np.zeros((MIXERS, INPUTS), np.int16)
    contexts, _ = unpacked(packed(logits, counts, none))
    Path(arguments.out).write_text(packed(logits, counts, fit_mixers(examples, contexts)))


if __name__ == "__main__":
    main()
