"""The logistic distributions that stand for symbols in estimates of rates."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

#: Number of scales; a scale index is a real number in [0, SCALES - 1].
SCALES = 64
#: The integer prior gives means in units of 1 / MEAN_LEVELS and scale indices in units of 1 / INDEX_LEVELS.
MEAN_LEVELS, INDEX_LEVELS = 8, 4
MEAN_MAX = 32767
INDEX_MAX = (SCALES - 1) * INDEX_LEVELS
#: Scale index of an output of zero.
INDEX_MIDDLE = SCALES // 2 * INDEX_LEVELS
#: Tables of bits are in units of 2^-RATE_BITS.
RATE_BITS = 8
#: Number of distances from the mean, in units of 1 / MEAN_LEVELS, in the table of the optimised quantiser.
DISTANCES = 256
#: Largest price of the squared error of one quantiser step, in 2^-RATE_BITS bits.
PRICE_MAX = 2**21


@cache
def scale_table() -> NDArray[np.float64]:
    """Logarithms of scales (SCALES,) whose discretised entropies grow geometrically, from 0.004 to 9 bits."""
    grid = np.exp(np.linspace(np.log(0.02), np.log(200.0), 4000))
    entropies = []
    for s in grid:
        k = np.arange(int(40 * s) + 4)
        p = 0.5 * (np.tanh((k + 0.5) / (2 * s)) - np.tanh((k - 0.5) / (2 * s)))
        p = np.maximum(p, 1e-300)
        h = -p * np.log2(p)
        entropies.append(h[0] + 2 * h[1:].sum())
    targets = np.exp(np.linspace(np.log(0.004), np.log(9.0), SCALES))
    return np.interp(np.log(targets), np.log(np.array(entropies)), np.log(grid))
