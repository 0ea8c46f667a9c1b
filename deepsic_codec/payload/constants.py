"""Constants that the format, the codec and the networks share."""

from math import log
from typing import Any

LATENT_STRIDE = 16  # pixels per latent position, along y and x
LABEL_CELL = 64  # pixels per side of the squares that the semantic head classifies; label tiles are multiples of it
# Networks have qualities up to MAX_QUALITY, wavelets go on to DEEP_QUALITY.
# What is added to the values of an embedding, -127 to 127, in the cells of a head: 0 is then no value.
EMBEDDING_ZERO = 128
MIN_QUALITY, MAX_QUALITY, DEEP_QUALITY = 1.0, 100.0, 200.0
# Quantiser steps in grey levels of an orthonormal transform, at these qualities.
MAX_STEP, MIN_STEP, DEEP_STEP = 200.0, 4.0, 1 / 64


def quality_step(quality: Any) -> Any:
    """Return the nominal step of the quantiser at a quality from 1 to 100, a number, array or tensor.

    In grey levels (1/255 of the coded range): 200 at quality 1, 4 at quality 100, log-linear between.
    """
    return MAX_STEP * (MIN_STEP / MAX_STEP) ** ((quality - MIN_QUALITY) / (MAX_QUALITY - MIN_QUALITY))


def deep_step(quality: float) -> float:
    """Return the nominal step of the quantiser at a quality from 1 to 200.

    In 255ths of the range of values. It is `quality_step` up to 100, and falls log-linearly from there to 1/64 at 200.
    """
    if quality <= MAX_QUALITY:
        return float(quality_step(quality))
    return float(MIN_STEP * (DEEP_STEP / MIN_STEP) ** ((quality - MAX_QUALITY) / (DEEP_QUALITY - MAX_QUALITY)))


def deep_quality(step: float) -> float:
    """Return the quality of a step, between 1 and 200."""
    if step >= MIN_STEP:
        share = log(MAX_STEP / step) / log(MAX_STEP / MIN_STEP)
        return max(MIN_QUALITY, MIN_QUALITY + share * (MAX_QUALITY - MIN_QUALITY))
    share = log(MIN_STEP / step) / log(MIN_STEP / DEEP_STEP)
    return min(DEEP_QUALITY, MAX_QUALITY + share * (DEEP_QUALITY - MAX_QUALITY))
