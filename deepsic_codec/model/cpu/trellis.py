"""Symbols on the path through the trellis that costs least, in bits and error (`docs/entropy-coder.md`).

Rates are those of the coder's tables at the start of a chunk: equal latents give equal symbols on every machine.
Refinement also asks for the expected symbols over all paths, each as likely as its cost makes it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import constant, inline, inner, int32, jit
from deepsic_codec.model.exact.formats import STEP_BITS
from deepsic_codec.model.logistic import PRICE_MAX, RATE_BITS
from deepsic_codec.model.schedule import Step
from deepsic_codec.payload.coders.contexts import FRACTIONS, SCALES, UNARY, CoderTables, ContextLayout
from deepsic_codec.payload.coders.symbols import SYMBOL_MAX, number_of, odd_mean
from deepsic_codec.payload.coders.trellis import BEFORE, NEXT, add_value, add_zero, best_state, start_costs

#: Units of a half step in which errors are measured.
UNIT = 1 << 8
#: Latents up to this many half steps may become 0.
ZERO_REACH = 8
#: Latents beyond this, in 1 / UNIT of a half step, are looked at in any case.
NEAR = 384
#: Bits that a path through another state may save: latents too small to save more by an error are 0 on every path.
SLACK = 5120
#: Positions whose expected symbols are computed at once, and positions after them that are looked at, too.
SEGMENT, LOOKAHEAD = 64, 8
#: Bits above the least from which on an option is as unlikely as any, and the least of likelihoods and probabilities.
UNLIKELY, LEAST = 64, 1e-60
#: Weight of the error against that of the optimised scalar quantiser; 0.45 to 1.5 were tried on photographs.
WEIGHT = 0.7


class TrellisRates(NamedTuple):
    """Rates in 2^-RATE_BITS bits, of the sets of contexts for even and odd states.

    Attributes
    ----------
    zero : int32 (2,SCALES,FRACTIONS,2,2)
        Zero flag, by scale level, fraction, and whether the mean rounds to 0.
    sign : int32 (SCALES,FRACTIONS,2)
    unary : int32 (2,SCALES,UNARY + 1)
        A coarse magnitude, by scale level; the last is that of the escape, without what follows.
    low_bits : int32 (SCALES,)
    level : int32 (256,)
        Scale level of a scale index.
    least : int32 (SCALES,)
        What a number other than 0 costs more than 0 at a mean of 0, at least, less `SLACK`.
    price : int32 (qualities,C)
        Squared error of a half step; `choose_path` takes a row of it, or other prices.
    """

    zero: NDArray[np.int32]
    sign: NDArray[np.int32]
    unary: NDArray[np.int32]
    low_bits: NDArray[np.int32]
    level: NDArray[np.int32]
    least: NDArray[np.int32]
    price: NDArray[np.int32]


def cost_table() -> NDArray[np.int32]:
    """Return the bits of an event of probability n / 65536 in 2^-RATE_BITS, n = 0..65536; that of 0 is that of 1."""
    n = np.maximum(np.arange(65537), 1)
    return np.rint(-(2**RATE_BITS) * np.log2(n / 65536)).astype(np.int32)


COST = cost_table()


def make_rates(
    tables: CoderTables, latents: int, price: NDArray[np.int32], step: NDArray[np.int32], half: NDArray[np.int32]
) -> TrellisRates:
    """Return the rates of a model file: of its coder's tables, and of the `price` of a step (qualities,C)."""
    at = ContextLayout.of(latents)
    one = COST[np.maximum(tables.probabilities.astype(np.int64), 1)].astype(np.int64)
    none = COST[65536 - tables.probabilities.astype(np.int64)].astype(np.int64)
    zero = np.empty((2, SCALES, FRACTIONS, 2, 2), np.int64)
    unary = np.empty((2, SCALES, UNARY + 1), np.int64)
    for quantiser in range(2):
        first = quantiser * at.odd
        for flag, cost in ((0, none), (1, one)):
            by_scale = cost[first + at.zero_scale :][: SCALES * FRACTIONS * 2]
            zero[quantiser, ..., flag] = by_scale.reshape(SCALES, FRACTIONS, 2)
            # below this level, one context codes the flag: of neighbours that are 0
            by_previous = cost[first + at.zero_previous :][: SCALES * 30].reshape(SCALES, 30)
            zero[quantiser, : tables.single, ..., flag] = by_previous[: tables.single, 0, None, None]
        bins = slice(first + at.unary_scale, first + at.unary_scale + SCALES * UNARY)
        ones = np.cumsum(one[bins].reshape(SCALES, UNARY), axis=1)
        unary[quantiser, :, 0] = 0
        unary[quantiser, :, 1:] = ones
        unary[quantiser, :, :UNARY] += none[bins].reshape(SCALES, UNARY)
    signs = slice(at.sign, at.sign + SCALES * FRACTIONS)
    sign = np.stack([none[signs], one[signs]], axis=-1).reshape(SCALES, FRACTIONS, 2)
    more = zero[..., 0, 0, 1] - zero[..., 0, 0, 0] + unary[:, :, 0]
    ratio = half.astype(np.float64) / step
    of_half = np.floor(WEIGHT * price * ratio * ratio + 0.5).clip(0, PRICE_MAX)
    return TrellisRates(
        zero.astype(np.int32),
        sign.astype(np.int32),
        unary.astype(np.int32),
        tables.low_bits.astype(np.int32),
        tables.levels.astype(np.int32),
        (more.min(axis=0) + sign[:, 0].min(axis=-1) - SLACK).astype(np.int32),
        of_half.astype(np.int32),
    )


class PathWork(NamedTuple):
    """Memory of a thread for the symbols of some positions.

    Attributes
    ----------
    units : int32 (n,)
        Latents in 1 / UNIT of a half step.
    options : int16 (n,4)
        Symbols: even and odd numbers of even states, then those of odd states.
    ways : int32 (n,)
        For each state, whether the better path to it has an odd number; -1 where all paths have 0.
    """

    units: NDArray[np.int32]
    options: NDArray[np.int16]
    ways: NDArray[np.int32]


def path_work(symbols: int) -> PathWork:
    """Return memory for this number of symbols."""
    work: PathWork = constant(
        PathWork(np.empty(symbols, np.int32), np.empty((symbols, 4), np.int16), np.empty(symbols, np.int32))
    )
    return work


class ExpectGrid(NamedTuple):
    """A chunk of which expected symbols are wanted; all arrays but `price` and `weights` are (S,h,w,C).

    Attributes
    ----------
    expected : float32
        Result, in half steps.
    targets : int32
        Symbols of the least cost apart from their own bits, in 1 / UNIT of a half step.
    means, indices : int16, uint8
        Predictions: means in eighths of a number, and scale indices in quarters.
    price : int32 (C,)
        Squared error of a half step in 2^-RATE_BITS bits.
    weights : int32 (S,h,w)
        Of errors, in 1 / 256.
    """

    expected: NDArray[np.float32]
    targets: NDArray[np.int32]
    means: NDArray[np.int16]
    indices: NDArray[np.uint8]
    price: NDArray[np.int32]
    weights: NDArray[np.int32]


class ExpectWork(NamedTuple):
    """Memory for the expected symbols of a segment.

    Attributes
    ----------
    state : float64 (8,)
        Probabilities of the states before the segment, given what lies before.
    forward : float64 (n,8)
        The same before each symbol.
    factors, options : float64, int16 (n,4)
        Likelihood and value of the best even and odd number of even states, then of odd ones.
    """

    state: NDArray[np.float64]
    forward: NDArray[np.float64]
    factors: NDArray[np.float64]
    options: NDArray[np.int16]


@inline
def _rate(number, mean, level, quantiser, rates):
    """Return the bits of a number."""
    centre = (mean + 4) >> 3
    fraction = mean - (centre << 3)
    difference = number - centre
    if fraction < 0:
        fraction, difference = -fraction, -difference
    nonzero_mean = 1 if centre != 0 else 0
    flags = rates.zero[quantiser, level, fraction, nonzero_mean]
    bits = np.int64(flags[0])
    if difference != 0:
        low_bits = np.int64(rates.low_bits[level])
        coarse = (abs(difference) - 1) >> low_bits
        bits = np.int64(flags[1]) + rates.sign[level, fraction, 1 if difference < 0 else 0] + (low_bits << RATE_BITS)
        bits += rates.unary[quantiser, level, min(coarse, UNARY)]
        if coarse >= UNARY:
            rest = coarse - UNARY + 1
            while rest > 1:
                rest >>= 1
                bits += 2 << RATE_BITS
            bits += 1 << RATE_BITS
    return bits


@inline
def _options(units, mean, level, quantiser, price, rates):
    """Return the cost of the best symbol with an even number, of that with an odd one, and these symbols.

    Of each parity, it is the one of the two nearest, or 0.
    """
    # the nearest symbols: 2 n and 2 n + 2, or 2 n - 1 and 2 n + 1 of which 0 takes the place of the one beyond it
    magnitude = abs(units)
    number = (magnitude + quantiser * UNIT) // (2 * UNIT)
    even_cost, odd_cost = np.int64(0), np.int64(0)
    even, odd = np.int64(0), np.int64(0)
    for n in range(2):
        one = number + n
        symbol = 2 * one - (quantiser if one > 0 else 0)
        signed = -symbol if units < 0 else symbol
        cost = (price * signed * (UNIT * signed - 2 * units)) >> RATE_BITS
        cost += _rate(-one if units < 0 else one, mean, level, quantiser, rates)
        if one & 1:
            odd_cost, odd = cost, signed
        else:
            even_cost, even = cost, signed
    if even != 0 and magnitude <= ZERO_REACH * UNIT:
        cost = _rate(np.int64(0), mean, level, quantiser, rates)
        if cost <= even_cost:
            even_cost, even = cost, np.int64(0)
    return even_cost, odd_cost, even, odd


@inline
def _is_zero(units, other, level, price, rates):
    """Return whether a symbol is 0 on every path; `other` is its mean in odd states."""
    saved = ((2 * abs(units) - UNIT) * price) >> RATE_BITS
    return -4 <= other < 4 and abs(units) <= NEAR and saved <= rates.least[level]


@inner
def choose_path(state, position, count_of_positions, s, start, count, positions, grid, means, indices, rates, work):
    """Choose the symbols of some positions and return the state after them; `state` is that before."""
    ys, xs = positions
    unit, limit = np.float32(UNIT << STEP_BITS), np.float32((SYMBOL_MAX - 2) * UNIT)
    half = np.float32(0.5)
    steps, price = grid.steps[start : start + count], grid.price[start : start + count]
    for i in range(count_of_positions):
        latents = grid.latents[s, ys[position + i], xs[position + i], start : start + count]
        units = work.units[i * count : (i + 1) * count]
        for c in range(count):  # in single precision, as elsewhere
            units[c] = int32(np.floor(min(max(np.float32(latents[c]) * unit / steps[c], -limit), limit) + half))
    costs = start_costs(state)
    for i in range(count_of_positions):
        weight = np.int64(256)
        if grid.weights.size:
            weight = np.int64(grid.weights[s, ys[position + i], xs[position + i]])
        for c in range(count):
            n = i * count + c
            units, mean = np.int64(work.units[n]), np.int64(means[n])
            level = np.int64(rates.level[indices[n]])
            of_channel: Any = min((np.int64(price[c]) * weight) >> 8, PRICE_MAX)
            other = odd_mean(mean)
            if _is_zero(units, other, level, of_channel, rates):
                a0 = np.int64(rates.zero[0, level, abs(mean), 0, 0])
                b0 = np.int64(rates.zero[1, level, abs(other), 0, 0])
                costs = add_zero(costs, a0, b0)
                work.ways[n] = -1
                continue
            a0, a1, even, odd = _options(units, mean, level, 0, of_channel, rates)
            work.options[n, 0], work.options[n, 1] = even, odd
            b0, b1, even, odd = _options(units, other, level, 1, of_channel, rates)
            work.options[n, 2], work.options[n, 3] = even, odd
            costs, work.ways[n] = add_value(costs, a0, a1, b0, b1)
    last = best_state(costs)
    state = last
    for i in range(count_of_positions - 1, -1, -1):
        symbols = grid.source[s, ys[position + i], xs[position + i], start : start + count]
        for c in range(count - 1, -1, -1):
            n = i * count + c
            ways: Any = np.int64(work.ways[n])
            if ways < 0:
                symbols[c] = 0
                state = BEFORE[state, 0]
                continue
            odd = (ways >> state) & 1
            state = BEFORE[state, odd]
            symbols[c] = work.options[n, 2 * (state & 1) + odd]
    return last


@inline
def _likelihood(bits, least, table):
    """Return the likelihood of an option against that of the best."""
    return table[min(bits - least, table.size - 1)]


@inline
def _scaled(p):
    """Return eight likelihoods whose sum is one, none of which is so small that products of them vanish."""
    p0, p1, p2, p3, p4, p5, p6, p7 = p
    one, more = 1 / (p0 + p1 + p2 + p3 + p4 + p5 + p6 + p7), LEAST
    return (
        p0 * one + more, p1 * one + more, p2 * one + more, p3 * one + more,
        p4 * one + more, p5 * one + more, p6 * one + more, p7 * one + more,
    )  # fmt: skip


@inline
def _options_at(n, c, place, grid, rates, table, work):
    """Note likelihoods and values of the options of channel `c` at a `place`, which are the `n`th of a segment."""
    s, y, x = place
    units, mean = np.int64(grid.targets[s, y, x, c]), np.int64(grid.means[s, y, x, c])
    level = np.int64(rates.level[grid.indices[s, y, x, c]])
    price: Any = min((np.int64(grid.price[c]) * np.int64(grid.weights[s, y, x])) >> 8, PRICE_MAX)
    other = odd_mean(mean)
    factors, options = work.factors[n], work.options[n]
    if _is_zero(units, other, level, price, rates):
        a0 = np.int64(rates.zero[0, level, abs(mean), 0, 0])
        b0 = np.int64(rates.zero[1, level, abs(other), 0, 0])
        least = min(a0, b0)
        factors[0], factors[2] = _likelihood(a0, least, table), _likelihood(b0, least, table)
        factors[1], factors[3] = 0, 0
        options[0], options[1], options[2], options[3] = 0, 0, 0, 0
        return
    a0, a1, even, odd = _options(units, mean, level, 0, price, rates)
    options[0], options[1] = even, odd
    b0, b1, even, odd = _options(units, other, level, 1, price, rates)
    options[2], options[3] = even, odd
    least = min(min(a0, a1), min(b0, b1))
    factors[0], factors[1] = _likelihood(a0, least, table), _likelihood(a1, least, table)
    factors[2], factors[3] = _likelihood(b0, least, table), _likelihood(b1, least, table)


@inner
def _expect_segment(segment, s, start, count, positions, grid, rates, table, work):
    """Compute the expected symbols from the first to the last position of a segment; keep the state in its middle."""
    (first, kept, last), (ys, xs) = segment, positions
    p = _scaled((
        work.state[0], work.state[1], work.state[2], work.state[3],
        work.state[4], work.state[5], work.state[6], work.state[7],
    ))  # fmt: skip
    for i in range(first, last):
        for c in range(count):
            n = (i - first) * count + c
            before, factors = work.forward[n], work.factors[n]
            p0, p1, p2, p3, p4, p5, p6, p7 = p
            before[0], before[1], before[2], before[3] = p0, p1, p2, p3
            before[4], before[5], before[6], before[7] = p4, p5, p6, p7
            _options_at(n, start + c, (s, ys[i], xs[i]), grid, rates, table, work)
            a, b, e, o = factors[0], factors[1], factors[2], factors[3]
            p = _scaled((
                p0 * a + p4 * b, p4 * a + p0 * b, p5 * e + p1 * o, p1 * e + p5 * o,
                p6 * a + p2 * b, p2 * a + p6 * b, p3 * e + p7 * o, p7 * e + p3 * o,
            ))  # fmt: skip
        if i == kept - 1:
            state = work.state
            state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7] = p
    one = np.float64(1)
    later = (one, one, one, one, one, one, one, one)
    for i in range(last - 1, first - 1, -1):
        out = grid.expected[s, ys[i], xs[i], start : start + count]
        for c in range(count - 1, -1, -1):
            n = (i - first) * count + c
            before, options, factors = work.forward[n], work.options[n], work.factors[n]
            a, b, e, o = factors[0], factors[1], factors[2], factors[3]
            l0, l1, l2, l3, l4, l5, l6, l7 = later
            a *= before[0] * l0 + before[2] * l5 + before[4] * l1 + before[6] * l4
            b *= before[0] * l1 + before[2] * l4 + before[4] * l0 + before[6] * l5
            e *= before[1] * l3 + before[3] * l6 + before[5] * l2 + before[7] * l7
            o *= before[1] * l2 + before[3] * l7 + before[5] * l3 + before[7] * l6
            value = a * options[0] + b * options[1]
            value += e * options[2] + o * options[3]
            out[c] = value / (a + b + e + o)
            a, b, e, o = factors[0], factors[1], factors[2], factors[3]
            later = _scaled((
                a * l0 + b * l1, e * l3 + o * l2, a * l5 + b * l4, e * l6 + o * l7,
                a * l1 + b * l0, e * l2 + o * l3, a * l4 + b * l5, e * l7 + o * l6,
            ))  # fmt: skip


@jit
def _expect_step(start, count, positions, grid, rates, table, work):
    """Compute the expected symbols of a step of the coding order."""
    places = positions[0].size
    work.state[0] = 1
    for state in range(1, 8):
        work.state[state] = 0
    for s in range(grid.expected.shape[0]):
        for first in range(0, places, SEGMENT):
            kept = min(first + SEGMENT, places)
            segment = first, kept, min(kept + LOOKAHEAD, places)
            _expect_segment(segment, s, start, count, positions, grid, rates, table, work)


def expected_symbols(
    steps: Sequence[Step], grid: ExpectGrid, rates: TrellisRates, temperature: float
) -> NDArray[np.float32]:
    """Return `grid.expected`: symbols over all paths, whose probabilities are exp(-cost / temperature).

    Parameters
    ----------
    steps : sequence of Step
        Of the coding order.
    grid : ExpectGrid
    rates : TrellisRates
    temperature : float
        In bits.
    """
    bits = np.arange(UNLIKELY << RATE_BITS) / 2**RATE_BITS
    table = np.maximum(np.exp(-bits / temperature), LEAST)
    for step in steps:
        positions = step.positions(*grid.expected.shape[1:3])
        n = (SEGMENT + LOOKAHEAD) * step.count
        shapes = ((8,), np.float64), ((n, 8), np.float64), ((n, 4), np.float64), ((n, 4), np.int16)
        work = ExpectWork(*(np.empty(shape, dtype) for shape, dtype in shapes))
        _expect_step(step.start, step.count, positions, grid, rates, table, work)
    return grid.expected


@jit
def _trace(symbols, positions, start, count, odd):
    """Write whether the states of a path are odd, for one pass of one group."""
    (ys, xs), state = positions, np.int64(0)
    for s in range(symbols.shape[0]):
        for i in range(ys.size):
            row, to = symbols[s, ys[i], xs[i]], odd[s, ys[i], xs[i]]
            for c in range(start, start + count):
                to[c] = state & 1
                state = NEXT[state, number_of(np.int64(row[c]), 1) & 1]


def odd_states(steps: Sequence[Step], symbols: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Return which symbols (S,h,w,C) of a chunk, on a path through the trellis, are those of odd states."""
    odd = np.empty(symbols.shape, np.uint8)
    for step in steps:
        positions = step.positions(*symbols.shape[1:3])
        if len(positions[0]):
            _trace(symbols, positions, step.start, step.count, odd)
    return odd.astype(np.bool_)
