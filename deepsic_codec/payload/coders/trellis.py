"""The trellis of eight states of dependent quantisation, for the coders of symbols and of wavelets.

Its state says which of two quantisers the next value has, and the parity of that value which state follows: the trellis
of JPEG 2000 part 2. An encoder takes the path of the least cost, by the Viterbi algorithm.
"""

from typing import Any

import numpy as np

from deepsic_codec.kernels import inline

# The next of the eight states by state and lowest bit of the magnitude. Even states quantise to whole steps, odd ones
# to odd halves of a step and to 0.
NEXT = np.array([[0, 1], [3, 2], [5, 4], [6, 7], [1, 0], [2, 3], [4, 5], [7, 6]], np.int64)
# The state before, by state and lowest bit of the magnitude.
BEFORE = np.array([[0, 4], [4, 0], [5, 1], [1, 5], [6, 2], [2, 6], [3, 7], [7, 3]], np.int64)
IMPOSSIBLE = 1 << 60  # cost of a path that there is not


@inline
def start_costs(state):
    """Return the costs of the paths to the eight states where only one of them is possible."""
    far, none = np.int64(IMPOSSIBLE), np.int64(0)
    c0, c1 = (none if state == 0 else far), (none if state == 1 else far)
    c2, c3 = (none if state == 2 else far), (none if state == 3 else far)
    c4, c5 = (none if state == 4 else far), (none if state == 5 else far)
    c6, c7 = (none if state == 6 else far), (none if state == 7 else far)
    return c0, c1, c2, c3, c4, c5, c6, c7


@inline
def add_zero(costs, a0, b0):
    """Return the costs after a value that is 0 on every path; 0 costs `a0` in even states and `b0` in odd ones."""
    c0, c1, c2, c3, c4, c5, c6, c7 = costs
    return c0 + a0, c4 + a0, c5 + b0, c1 + b0, c6 + a0, c2 + a0, c3 + b0, c7 + b0


@inline
def add_value(costs, a0, a1, b0, b1):
    """Return the costs after a value, and a bit for each state: whether the better path to it has an odd magnitude.

    Even magnitudes cost `a0` in even states and `b0` in odd ones, odd magnitudes `a1` and `b1`. Even ones win ties.
    """
    c0, c1, c2, c3, c4, c5, c6, c7 = costs
    d0, e0 = c0 + a0, c4 + a1
    d1, e1 = c4 + a0, c0 + a1
    d2, e2 = c5 + b0, c1 + b1
    d3, e3 = c1 + b0, c5 + b1
    d4, e4 = c6 + a0, c2 + a1
    d5, e5 = c2 + a0, c6 + a1
    d6, e6 = c3 + b0, c7 + b1
    d7, e7 = c7 + b0, c3 + b1
    ways = (e0 < d0) | (e1 < d1) << 1 | (e2 < d2) << 2 | (e3 < d3) << 3
    ways = ways | (e4 < d4) << 4 | (e5 < d5) << 5 | (e6 < d6) << 6 | (e7 < d7) << 7
    costs = (
        min(d0, e0), min(d1, e1), min(d2, e2), min(d3, e3), min(d4, e4), min(d5, e5), min(d6, e6), min(d7, e7),
    )  # fmt: skip
    return costs, ways


@inline
def best_state(costs):
    """Return the state of the path of the least cost; the lowest of several."""
    c0, c1, c2, c3, c4, c5, c6, c7 = costs
    least = min(min(min(c0, c1), min(c2, c3)), min(min(c4, c5), min(c6, c7)))
    state: Any = np.int64(7)
    for number, cost in ((6, c6), (5, c5), (4, c4), (3, c3), (2, c2), (1, c1), (0, c0)):
        if cost == least:
            state = np.int64(number)
    return state
