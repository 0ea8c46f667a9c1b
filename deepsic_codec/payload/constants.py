"""Constants that the format, the codec and the networks share."""

from typing import Any

LATENT_STRIDE = 16  # pixels per latent position, along y and x
LABEL_CELL = 64  # pixels per side of the squares that the semantic head classifies; label tiles are multiples of it
MIN_QUALITY, MAX_QUALITY = 1.0, 100.0
# Quantiser steps in grey levels of an orthonormal transform, at the lowest and the highest quality.
MAX_STEP, MIN_STEP = 200.0, 4.0


def quality_step(quality: Any) -> Any:
    """Return the nominal step of the quantiser at a quality from 1 to 100, a number, array or tensor.

    In grey levels (1/255 of the coded range): 200 at quality 1, 4 at quality 100, log-linear between.
    """
    return MAX_STEP * (MIN_STEP / MAX_STEP) ** ((quality - MIN_QUALITY) / (MAX_QUALITY - MIN_QUALITY))
