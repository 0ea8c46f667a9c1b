"""A second decoder of feature sections, in plain Python and numpy integers, written from docs/entropy-coder.md alone.

Slow and plain on purpose: it shares no line with the package, so that a mistake in either shows.
"""

import math

import numpy as np

MAX_SYMBOL = 32767


def half_up(value):
    return math.floor(value + 0.5)


def shifted(values, shift):
    """round(v / 2^s) of integers, with a shift for each column."""
    return np.array(
        [(v + (1 << (s - 1))) >> s if s > 0 else v << -s for v, s in zip(values.tolist(), shift.tolist(), strict=True)]
    )


STRETCH = [
    max(-3071, min(3071, half_up(256 * math.log(x / (1 - x))))) for x in ((i + 0.5) / 16384 for i in range(16384))
]
SQUASH = [max(16, min(65520, half_up(65536 / (1 + math.exp(-d / 256))))) for d in range(-3071, 3072)]
RECIPROCAL = [half_up(65536 / (n + 1.5)) for n in range(1024)]
BOUNDS = (1, 2, 3, 4, 6, 8, 12, 20, 36)
DIAGONAL = ((-1, -1), (-1, 1), (1, -1), (1, 1))
CROSS = ((0, -1), (0, 1), (-1, 0), (1, 0))
CENTRE = ((0, 0),)


class Bits:
    """Section "Arithmetic coder"."""

    def __init__(self, data):
        self.data, self.at = data, 0
        self.low, self.high, self.value = 0, (1 << 48) - 1, 0
        for _ in range(6):
            self.value = self.value << 8 | self.byte()

    def byte(self):
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def bit(self, probability):
        middle = self.low + ((self.high - self.low) >> 16) * probability
        one = self.value <= middle
        if one:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 40 == self.high >> 40:
            self.low = (self.low << 8) & ((1 << 48) - 1)
            self.high = ((self.high << 8) & ((1 << 48) - 1)) + 255
            self.value = ((self.value << 8) & ((1 << 48) - 1)) + self.byte()
        return one


class Contexts:
    """Section "Contexts"."""

    def __init__(self, tables, latents):
        self.limit, self.rate, self.single = (int(tables[k]) for k in ("limit", "rate", "single"))
        self.p = [int(p) * 64 for p in tables["probabilities"]]
        self.count = [min(int(c), self.limit) for c in tables["confidence"]]
        self.mixers = [[int(w) for w in row] for row in tables["weights"]]
        sizes = (128 * 5 * 2, 2 * latents * 10 * 2, 128 * 6 * 5, 128 * 5, 128 * 12, 16 * 10 * 12)
        sizes += (latents * 3 * 4, 128, 17)
        names = ("level", "channel", "previous", "sign", "unary_level", "unary_near", "unary_channel", "low", "escape")
        self.start = dict(zip(names, np.cumsum((0, *sizes[:-1])).tolist(), strict=True))
        assert sum(sizes) == len(self.p)

    def learn(self, i, one):
        self.p[i] += (((4194303 if one else 0) - self.p[i]) * RECIPROCAL[self.count[i]]) >> 16
        self.count[i] = min(self.count[i] + 1, max(self.limit, self.count[i]))

    def alone(self, bits, i):
        one = bits.bit(max(16, min(65520, self.p[i] >> 6)))
        self.learn(i, one)
        return one

    def mixed(self, bits, mixer, three):
        w = self.mixers[mixer]
        a = [STRETCH[self.p[i] >> 8] for i in three] + [256]
        dot = max(-3071, min(3071, sum(x * y for x, y in zip(w, a, strict=True)) >> 16))
        p = SQUASH[dot + 3071]
        one = bits.bit(p)
        if self.rate:
            for k in range(4):
                w[k] += (a[k] * ((65535 if one else 0) - p) * self.rate + 131072) >> 18
        for i in three:
            self.learn(i, one)
        return one


def passes(groups):
    start = 0
    for i, count in enumerate(groups):
        names = (("A", ()), ("B", DIAGONAL), ("C", CROSS)) if i == 0 else (("1", ()), ("2", CROSS))
        for name, own in names:
            yield start, count, name, own
        start += count


def belongs(name, y, x):
    odd = (y + x) % 2 == 1
    return {"A": not odd and y % 2 == 0, "B": not odd and y % 2 == 1, "C": odd, "1": not odd, "2": odd}[name]


def predict(p, compand, at, start, count, own, quality, detail):
    """Section "Prior": means and indices of one position; ``at(dy, dx)`` gives the symbols of a neighbour."""

    def m(q):
        return compand[np.abs(q)].astype(int)

    def clipped(q):
        return np.clip(q, -127, 127)

    group = slice(start, start + count)
    x = [m(at(*o)[group]) for o in own]
    if start < detail:
        x += [clipped(at(*o)[group]) for o in own]
    if start:
        near = min(start, detail)
        x += [m(at(*o)[:start]) for o in CENTRE + CROSS] + [m(at(*o)[:near]) for o in DIAGONAL]
        x += [clipped(at(*o)[:near]) for o in CENTRE + CROSS]
    o = p["out_bias"][quality - 1].astype(int)
    shift = p["out_shift"].astype(int)
    if x:
        x = np.concatenate(x)
        h = p["first"].astype(int) @ x + p["first_bias"][quality - 1]
        h = np.clip(shifted(h, p["first_shift"].astype(int) - 1), 0, 255)
        h = np.clip(shifted(p["second"].astype(int) @ h + p["second_bias"], p["second_shift"].astype(int)), 0, 255)
        o = o + p["out"].astype(int) @ h
    direct = np.zeros(count, int)
    for k, offset in enumerate(own if start < detail else ()):
        direct += p["direct"][k].astype(int) * clipped(at(*offset)[group])
    # o / 2^(s + 1) + D / 8 over one denominator
    means = [
        half_up_fraction(int(v) + (int(d) << (int(s) - 2)), int(s) + 1)
        for v, d, s in zip(o[:count], direct, shift[:count], strict=True)
    ]
    means = np.clip(means, -32767, 32767)
    return means, np.clip(shifted(o[count:], shift[count:] - 1) + 128, 0, 252)


def half_up_fraction(numerator, shift):
    return (numerator + (1 << (shift - 1))) >> shift


def decode(model, architecture, data, slices, grid, quality):
    """Symbols (slices, rows, columns, channels) of a feature section; ``model`` are the arrays of a model file."""
    groups = architecture["prior_groups"]
    latents = sum(groups)
    detail = architecture["prior_detail"]
    tables = {k.split(".")[2]: v for k, v in model.items() if k.startswith("decoder.coder.")}
    prior = {k[len("decoder.prior.") :]: v for k, v in model.items() if k.startswith("decoder.prior.")}
    bits, contexts = Bits(data), Contexts(tables, latents)
    q = np.zeros((slices, grid[0] + 2, grid[1] + 2, latents), int)  # with a border of zeros
    for number, (start, count, name, own) in enumerate(passes(groups)):
        mine = {k.split(".")[1]: v for k, v in prior.items() if k.split(".")[0] == str(number)}
        places = [(y, x) for y in range(grid[0]) for x in range(grid[1]) if belongs(name, y, x)]
        for s in range(slices):
            for y, x in places:

                def at(dy, dx, s=s, y=y, x=x):
                    return q[s, y + 1 + dy, x + 1 + dx]

                means, indices = predict(mine, prior["compand"], at, start, count, own, quality, detail)
                for c in range(count):
                    level = int(tables["levels"][indices[c]])
                    plain = int(tables["low_bits"][level])
                    at(0, 0)[start + c] = symbol(bits, contexts, at, start, c, int(means[c]), level, plain, bool(own))
    if bits.at < len(data):
        raise ValueError("bytes left over")
    return q[:, 1:-1, 1:-1]


def symbol(bits, contexts, at, start, c, mean, level, plain, second):
    """Sections "Binarisation" and "Contexts": one symbol."""
    k, first = start + c, contexts.start
    centre = (mean + 4) >> 3
    f = mean - 8 * centre
    flip = f < 0
    f = abs(f)
    n = 2 * sum(abs(int(at(*o)[k])) for o in CROSS) + sum(abs(int(at(*o)[k])) for o in DIAGONAL)
    near = sum(min(n, 63) >= bound for bound in BOUNDS)
    e = 0
    if c > 0:
        e += 2 * min(abs(int(at(0, 0)[k - 1])), 2)
    if c > 1:
        e += min(abs(int(at(0, 0)[k - 2])), 1)
    z = int(centre != 0)
    latents = len(at(0, 0))
    previous = first["previous"] + (level * 6 + e) * 5 + min(near >> 1, 4)
    if level < contexts.single:
        nonzero = contexts.alone(bits, previous)
    else:
        by_level = first["level"] + (level * 5 + f) * 2 + z
        by_channel = first["channel"] + ((int(second) * latents + k) * 10 + near) * 2 + z
        nonzero = contexts.mixed(bits, level, (by_level, by_channel, previous))
    if not nonzero:
        return centre
    negative = contexts.alone(bits, first["sign"] + level * 5 + f)
    v = 0
    while v < 12:
        three = (
            first["unary_level"] + level * 12 + v,
            first["unary_near"] + ((level >> 3) * 10 + near) * 12 + v,
            first["unary_channel"] + (k * 3 + min((e + 1) >> 1, 2)) * 4 + min(v, 3),
        )
        if not contexts.mixed(bits, 128 + 16 * min(v, 3) + (level >> 3), three):
            break
        v += 1
    if v == 12:
        length = 0
        while contexts.alone(bits, first["escape"] + length):
            length += 1
            if length == 17:
                raise ValueError("Exp-Golomb prefix of 17 ones")
        rest = 1
        for _ in range(length):
            rest = rest << 1 | bits.bit(32768)
        v = 12 + rest - 1
    for i in range(plain):
        v = v << 1 | (contexts.alone(bits, first["low"] + level) if i == 0 else bits.bit(32768))
    d = v + 1
    d = -d if negative else d
    value = centre - d if flip else centre + d
    if abs(value) > MAX_SYMBOL:
        raise ValueError("symbol out of range")
    return value
