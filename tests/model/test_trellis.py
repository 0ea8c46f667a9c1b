"""Symbols on a path through the trellis: chosen at the least cost, coded, and read back."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.batch import uses_trellis
from deepsic_codec.model.coding import decode_symbols, encode_symbols, predict
from deepsic_codec.model.cpu.prior import Prior as CpuPrior
from deepsic_codec.model.cpu.trellis import COST, UNIT, WEIGHT, odd_states
from deepsic_codec.model.exact.export import export_prior
from deepsic_codec.model.exact.prior import IntegerPrior
from deepsic_codec.model.likelihood import log_scales
from deepsic_codec.model.paper_networks import PaperTransforms
from deepsic_codec.model.prior import Prior, compand
from deepsic_codec.model.quantise import make_tables
from deepsic_codec.payload.coders.contexts import CoderTables, ContextLayout
from deepsic_codec.payload.coders.symbols import SymbolEncoder
from deepsic_codec.payload.coders.trellis import BEFORE, NEXT

ARCH = Architecture(latents=16, prior_groups=(4, 4, 4, 4), prior_width=16, knots=3, prior_detail=6)
QUALITY, STEP = 40, 12000


@pytest.fixture(scope="module")
def priors():
    """A prior of random weights in numpy and in torch, with random tables of the coder."""
    torch.manual_seed(0)
    prior = Prior(ARCH)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    tensors = export_prior(prior.eval())
    chance = np.random.default_rng(1)
    tables = CoderTables.untrained(ARCH.latents, log_scales().double().numpy())
    tables.probabilities[:] = chance.integers(3000, 60000, tables.probabilities.size)
    steps = {"step": np.full((100, 16), STEP, np.int32), "half": np.full((100, 16), STEP * 5 // 8, np.int32)}
    rates = make_tables(log_scales(), torch.from_numpy(steps["step"]))
    arrays = ({k: v.numpy() for k, v in part.items()} for part in (tensors, rates))
    return CpuPrior(ARCH, *arrays, steps, tables), IntegerPrior(ARCH, tensors), tables, rates["price"].numpy()


def path(numbers, steps):
    """The symbols that numbers (S,h,w,C) stand for."""
    doubled = 2 * numbers.astype(np.int16)
    return doubled - np.sign(doubled) * odd_states(steps, doubled)


def symbol_of(number, state):
    return 2 * number - (state & 1) * int(np.sign(number))


def test_the_states_before_are_the_inverse_of_the_states_after():
    for state in range(8):
        for odd in range(2):
            assert NEXT[BEFORE[state, odd], odd] == state
    assert sorted(NEXT[:, 0]) == sorted(NEXT[:, 1]) == list(range(8))


def test_no_rate_lies_near_a_tie():
    """The last bit of a logarithm could not change an entry."""
    bits = -256 * np.log2(np.arange(1, 65537) / 65536)
    assert np.abs(bits - np.floor(bits) - 0.5).min() > 1e-9 and COST[65536] == 0 and COST[32768] == 256


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_round_trips(priors, data):
    ours, theirs, tables, _ = priors
    shape = [data.draw(st.integers(1, n)) for n in (3, 7, 7)]
    spread = data.draw(st.sampled_from([0.3, 2, 40, 3000]))
    chance = np.random.default_rng(data.draw(st.integers(0, 99)))
    numbers = np.rint(chance.standard_normal((*shape, 16)) * spread).clip(-16000, 16000)
    symbols = path(numbers, ours.steps)
    stream = ours.encode(symbols, QUALITY, True)
    np.testing.assert_array_equal(ours.decode(stream, shape[0], tuple(shape[1:]), QUALITY, True), symbols)
    assert encode_symbols(theirs, tables, [symbols], [QUALITY], trellis=True) == [stream]
    (decoded,) = decode_symbols(theirs, tables, [stream], shape[0], tuple(shape[1:]), [QUALITY], trellis=True)
    np.testing.assert_array_equal(decoded, symbols)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 11), (2, 8, 5)])
def test_chosen_symbols_are_a_path(priors, shape):
    """They decode to themselves, whether they are coded as they are chosen or later, and stay near the latents."""
    ours, *_ = priors
    latents = np.rint(np.random.default_rng(3).laplace(0, 120, (*shape, 16))).astype(np.int32)
    half = np.full(16, STEP * 5 // 8, np.int32)
    symbols, stream = ours.choose(latents, half, QUALITY, True, True, True)
    alone, nothing = ours.choose(latents, half, QUALITY, True, False, True)
    assert nothing is None and ours.encode(symbols, QUALITY, True) == stream
    np.testing.assert_array_equal(alone, symbols)
    np.testing.assert_array_equal(ours.decode(stream, shape[0], shape[1:], QUALITY, True), symbols)
    assert np.abs(symbols - latents * 256 / half[0]).max() < 8


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [20, 60, 400])
def test_no_other_path_costs_less(priors, seed, spread):
    """All paths of the two nearest symbols of each state, and 0, are tried."""
    ours, theirs, tables, price = priors
    latents = np.rint(np.random.default_rng(seed).laplace(0, spread, (1, 1, 1, 16))).astype(np.int32)
    half = np.full(16, STEP * 5 // 8, np.int32)
    symbols, _ = ours.choose(latents, half, QUALITY, True, False, True)
    predicted = predict(theirs, torch.from_numpy(symbols), QUALITY, True)
    weight = WEIGHT * price[QUALITY - 1, 0] * (5 / 8) ** 2
    for group, (means, indices) in enumerate(predicted):
        channels = range(4 * group, 4 * group + 4)
        scaled = [latents[0, 0, 0, k] * 256 / half[k] for k in channels]

        def cost_of(numbers, means=means, indices=indices, scaled=scaled):
            state, total = 0, 0.0
            for i, number in enumerate(numbers):
                total += bits_of(tables, number, int(means[0, i]), int(indices[0, i]), state & 1)
                total += weight * (scaled[i] - symbol_of(number, state)) ** 2
                state = NEXT[state, number & 1]
            return total

        def near(numbers, scaled=scaled):
            state = 0
            for number, value in zip(numbers, scaled, strict=True):
                if number and (number * value < 0 or abs(symbol_of(number, state) - value) > 2):
                    return False
                state = NEXT[state, number & 1]
            return True

        ranges = [{0, *range(int(np.floor(v / 2)) - 1, int(np.ceil(v / 2)) + 2)} for v in scaled]
        least = min(cost_of(numbers) for numbers in product(*ranges) if near(numbers))
        chosen = np.sign(symbols[0, 0, 0, channels]) * ((np.abs(symbols[0, 0, 0, channels]) + 1) >> 1)
        assert cost_of(chosen.tolist()) <= least + 16, "2^-8 bits, for what is rounded"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_expected_symbols_are_those_of_all_paths(priors, seed, temperature):
    """Every path is tried, with the better of the two nearest numbers of each parity, or 0, at each state."""
    ours, _, tables, _ = priors
    random = np.random.default_rng(seed)
    targets = random.laplace(0, (0.5, 3.0)[seed % 2], (1, 1, 1, 16)).astype(np.float32)
    means, indices = random.integers(-9, 10, (1, 1, 1, 16)), random.integers(60, 200, (1, 1, 1, 16))
    price = np.full(16, 700, np.int32)
    prices = price, np.full((1, 1, 1), 256, np.int32)
    arrays = (v.astype(np.float32) for v in (targets, means / 8, indices / 4))
    expected = ours.expect(*arrays, prices, temperature)[0, 0, 0]
    for first in range(0, 16, 4):
        total, mean = 0.0, np.zeros(4)
        for parities in product((0, 1), repeat=4):
            state, cost, symbols = 0, 0.0, []
            for i, parity in enumerate(parities, first):
                target, odd = float(np.floor(targets[0, 0, 0, i] * UNIT + 0.5) / UNIT), state & 1
                lower = int((abs(target) + odd) // 2)
                numbers = {lower, lower + 1, 0} if abs(target) <= 8 else {lower, lower + 1}
                options = []
                for number in (n * (-1 if target < 0 else 1) for n in numbers if n % 2 == parity):
                    symbol = symbol_of(number, state)
                    bits = bits_of(tables, number, int(means[0, 0, 0, i]), int(indices[0, 0, 0, i]), odd)
                    options.append((bits + price[i] * (symbol - target) ** 2, symbol))
                added, symbol = min(options)
                cost, symbols, state = cost + added, [*symbols, symbol], NEXT[state, parity]
            chance = np.exp(-cost / 256 / temperature)
            total, mean = total + chance, mean + chance * np.array(symbols)
        np.testing.assert_allclose(expected[first : first + 4], mean / total, atol=0.05)


def test_expected_symbols_of_many_positions(priors):
    """At a low temperature, over several segments and slices, they are whole and as near as those of the best path."""
    ours, theirs, *_ = priors
    latents = np.rint(np.random.default_rng(8).laplace(0, 120, (2, 20, 21, 16))).astype(np.int32)
    half = np.full(16, STEP * 5 // 8, np.int32)
    prices = np.full(16, 700, np.int32), np.full((2, 20, 21), 256, np.int32)
    best, _ = ours.choose(latents, half, QUALITY, True, False, True, prices)
    means, indices = np.empty(best.shape, np.float32), np.empty(best.shape, np.float32)
    for step, (mean, index) in zip(ours.steps, predict(theirs, torch.from_numpy(best), QUALITY, True), strict=True):
        ys, xs = step.positions(20, 21)
        for whole, part in ((means, mean / 8), (indices, index / 4)):
            whole[:, ys, xs, step.channels] = np.asarray(part).reshape(2, len(ys), step.count)
    targets = latents * np.float32(256 / half[0])
    expected = ours.expect(targets, means, indices, prices, 0.02)
    assert np.mean(np.abs(expected - np.rint(expected)) < 0.1) > 0.95
    assert np.square(expected - targets).sum() < np.square(best - targets).sum()


def bits_of(tables, number, mean, index, odd):
    """Bits of a number in 2^-8, by the contexts of its scale level."""
    at, level = ContextLayout.of(16), int(tables.levels[index])
    if odd:
        mean += min(max(mean, -4), 4)
    centre = (mean + 4) >> 3
    fraction, difference = mean - 8 * centre, number - centre
    if fraction < 0:
        fraction, difference = -fraction, -difference

    def bits(bit, context):
        p = tables.probabilities[context] / 65536
        return -256 * np.log2(p if bit else 1 - p)

    zero = at.zero_scale + (level * 5 + fraction) * 2 + (centre != 0)
    if level < tables.single:
        zero = at.zero_previous + level * 30
    total = bits(difference != 0, zero + at.odd * odd)
    if difference:
        total += bits(difference < 0, at.sign + level * 5 + fraction) + 256 * int(tables.low_bits[level])
        coarse = (abs(difference) - 1) >> int(tables.low_bits[level])
        for v in range(min(coarse, 12)):
            total += bits(True, at.unary_scale + level * 12 + v + at.odd * odd)
        if coarse < 12:
            total += bits(False, at.unary_scale + level * 12 + coarse + at.odd * odd)
        else:
            total += 256 * (2 * (coarse - 11).bit_length() - 1)
    return total


def test_symbols_that_are_no_path_are_refused(priors):
    ours, _, tables, _ = priors
    symbols = np.full((1, 1, 1, 16), 3, np.int16)  # odd, in an even state
    with pytest.raises(CorruptPayload):
        ours.encode(symbols, QUALITY, True)
    encoder = SymbolEncoder(tables, symbols, True)
    passes, one = np.array([[0, 16, 0, 0, 1, 0]], np.int64), np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="no path"):
        encoder.encode(passes, one, one, np.zeros(16, np.int16), np.zeros(16, np.uint8))


def test_training_sees_what_the_coder_sees(priors):
    """Features and bins of the prior in training are those of numbers and states."""
    torch.manual_seed(2)
    prior, (ours, *_) = Prior(ARCH), priors
    numbers = np.rint(np.random.default_rng(5).laplace(0, 2, (2, 3, 4, 16)))
    symbols = np.concatenate([path(numbers[:1], ours.steps), numbers[1:].astype(np.int16)])
    trellis = torch.tensor([True, False])
    linear, magnitude = prior.features(torch.from_numpy(symbols).float(), True, trellis)
    assert torch.equal(linear * 8, torch.from_numpy(numbers).float())
    halves = torch.from_numpy(symbols[0] / 2)
    assert torch.equal(magnitude[0] * 8, torch.floor(compand(halves) + 0.5).float())
    odd = torch.zeros(2, 16, 3, 4, dtype=torch.bool)
    odd[0] = torch.from_numpy(odd_states(ours.steps, symbols[:1])[0]).permute(2, 0, 1)
    values, quality = torch.from_numpy(symbols).permute(0, 3, 1, 2).float(), torch.tensor([40.0, 40.0])
    bits = prior.symbol_bits(values, quality, trellis, odd)
    scalar = prior.bits(values[1:], *prior(values[1:], quality[1:], True))
    assert torch.equal(bits[1:], scalar) and bool((bits >= 0).all())
    # the bins of odd states share out all values
    one = torch.zeros(1, 16, 1, 1)
    every = [
        torch.exp2(-prior.symbol_bits(one + n, quality[:1], trellis[:1], torch.ones_like(one, dtype=torch.bool)))
        for n in (0, *range(1, 99, 2), *range(-1, -99, -2))
    ]
    assert torch.allclose(sum(every)[:, :4], torch.ones(1, 4, 1, 1), atol=1e-3)


def test_efforts_and_qualities_with_a_trellis():
    assert uses_trellis(1, 30.0) and not uses_trellis(1, 29.99) and not uses_trellis(0, 80)
    assert uses_trellis(2, 35.0) and not uses_trellis(2, 34.99)
    assert all(uses_trellis(effort, 45.0) and not uses_trellis(effort, 44.99) for effort in (3, 4))


def test_networks_in_floating_point_have_none():
    with pytest.raises(UnsupportedPayload, match="trellis"):
        PaperTransforms.latents(None, np.zeros((1, 1, 1, 4), np.int16), np.array([40.0]), True)
    with pytest.raises(UnsupportedPayload, match="trellis"):
        PaperTransforms.synthesise(None, np.zeros((1, 1, 1, 4), np.int16), np.array([40.0]), False, True)


def test_units():
    assert UNIT == 1 << 8, "costs are shifted down by RATE_BITS once for both"
