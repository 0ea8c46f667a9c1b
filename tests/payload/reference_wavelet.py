"""A second decoder of wavelet sections, in plain Python, written from docs/wavelet.md alone.

Slow and plain on purpose.  Of the package it shares nothing; the arithmetic decoder is that of `reference_coder`.
"""

import re
from pathlib import Path

import numpy as np

from tests.payload.reference_coder import RECIPROCAL, SQUASH, STRETCH, Bits

LOW, HORIZONTAL, VERTICAL, DIAGONAL = range(4)
MAX_SYMBOL = (1 << 26) - 1
NORMS = {
    LOW: (4096, 8053, 16887, 34479, 69381, 138990, 278107),
    HORIZONTAL: (None, 5096, 10062, 21081, 43007, 86516, 173302),
    DIAGONAL: (None, 3225, 5995, 12889, 26659, 53853, 107993),
}
NORMS[VERTICAL] = NORMS[HORIZONTAL]
WEIGHTS = (22000, 14000, 14000, 12000, 12000, 12000, 0)


def bits32(value):
    return (int(value) + (1 << 31)) % (1 << 32) - (1 << 31)


def sizes(height, width):
    """Sizes of the plane and its low bands."""
    found = [(height, width)]
    while min(found[-1]) >= 12 and len(found) <= 6:
        found.append(tuple((n + 1) // 2 for n in found[-1]))
    return found


def bands(height, width):
    """(level, kind, rows, columns) in the order of the stream."""
    low = sizes(height, width)
    found = [(len(low) - 1, LOW, *low[-1])]
    for level in range(len(low) - 1, 0, -1):
        (h, w), (rows, columns) = low[level - 1], low[level]
        found += [
            (level, HORIZONTAL, rows, w - columns),
            (level, VERTICAL, h - rows, columns),
            (level, DIAGONAL, h - rows, w - columns),
        ]
    return found


def band_step(code, level, kind):
    m = int(2 ** (15 + (code % 256) / 256) + 0.5)
    return (m << (code // 256 + 9)) // NORMS[kind][level]


def offsets():
    """The table of the page."""
    text = (Path(__file__).parents[2] / "docs" / "wavelet.md").read_text()
    block = re.search(r"<!-- offsets -->\s+```text\n(.*?)```", text, re.S).group(1)
    return [[int(v) for v in line.split()] for line in block.splitlines()]


OFFSETS = offsets()
NEXT = ((0, 1), (3, 2), (5, 4), (6, 7), (1, 0), (2, 3), (4, 5), (7, 6))


def rank_of(n):
    steps = 0
    while n >= 4096:
        n >>= 4
        steps += 16
    return min((n**4).bit_length() + steps if n else 0, 95)


class Coder:
    """Contexts by name, made as they are first used."""

    def __init__(self, data):
        if data[-1:] == b"\0":
            raise ValueError("the stream ends in a zero byte")
        self.bits, self.states, self.mixers = Bits(data), {}, {}

    def state(self, name):
        return self.states.setdefault(name, [1 << 21, 0])

    def learn(self, name, one):
        state = self.state(name)
        state[0] += (((4194303 if one else 0) - state[0]) * RECIPROCAL[state[1]]) >> 16
        state[1] = min(state[1] + 1, 255)

    def one(self, *name):
        bit = self.bits.bit(max(16, min(65520, self.state(name)[0] >> 6)))
        self.learn(name, bit)
        return int(bit)

    def even(self):
        return int(self.bits.bit(32768))

    def mixed(self, mixer, names):
        w = self.mixers.setdefault(mixer, list(WEIGHTS))
        a = [STRETCH[self.state(name)[0] >> 8] for name in names] + [256]
        dot = sum(x * y for x, y in zip(w, a, strict=True)) >> 16
        p = SQUASH[max(-3071, min(3071, dot)) + 3071]
        bit = self.bits.bit(p)
        for i in range(7):
            w[i] += (a[i] * ((65535 if bit else 0) - p) * 5 + 131072) >> 18
        for name in names:
            self.learn(name, bit)
        return bit


class Symbols(dict):
    """Symbols of a band as halves of a step, by (row, column), 0 where there is none."""

    def __missing__(self, place):
        return 0

    def mean(self, y, x):
        sides = (y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)
        return 8 * abs(self[y, x]) + 2 * sum(abs(self[place]) for place in sides)


def read_cells(section, slices, height, width):
    """Values [slice][row][column] of a quality map section."""
    if section[0]:
        raise ValueError("another layout")
    coder, cells = Coder(section[1:]), []
    for s in range(slices):
        cells.append([[0] * -(-width // 16) for _ in range(-(-height // 16))])
        for y, row in enumerate(cells[s]):
            for x in range(len(row)):
                before = cells[s - 1][y][x] if s else cells[0][0][0] if y or x else 0
                above = cells[s][y - 1][x] if y else before
                left = row[x - 1] if x else above
                corner = cells[s][y - 1][x - 1] if y and x else left
                n = (left == above) + 2 * (above == corner) + 4 * (left == corner) + 8 * (before == left)
                row[x] = read_cell(coder, n, left, above, before)
    if coder.bits.at < len(section) - 1:
        raise ValueError("bytes left over")
    return cells


def read_cell(coder, n, left, above, before):
    if coder.one("flag", n):
        return left
    if above != left and coder.one("flag", 16 + n):
        return above
    if before not in (left, above) and coder.one("flag", 32 + n):
        return before
    b = 1
    while b < 128:
        b = 2 * b + coder.one("bit", b)
    return b - 128


def value_of(cells, level, y, x):
    """Value of a coefficient of a slice."""
    reached = []
    for place, count in ((y, len(cells)), (x, len(cells[0]))):
        first, last = (place - 1 << level) // 16, ((place + 2 << level) - 1) // 16
        reached.append(range(min(max(first, 0), count - 1), min(last, count - 1) + 1))
    return min((cells[i][j] for i in reached[0] for j in reached[1] if cells[i][j]), default=0)


def common(halves, v):
    octave, rest = divmod(v - 1, 8)
    return min((((halves * int(2 ** (15 + rest / 8) + 0.5)) << octave) + (1 << 10)) >> 11, (1 << 31) - 1)


def own(number, v):
    if not v:
        return number
    octave, rest = divmod(v - 1, 8)
    return (number * int(2 ** (15 - rest / 8) + 0.5) + (1 << (18 + octave))) >> (19 + octave)


def decode(code, stream, slices, components, height, width, cells=None):
    """Planes, an integer array (slices, components, height, width), of a step and a stream."""
    coefficients = decode_coefficients(stream, code, slices, components, height, width, cells)
    return np.array([[inverse(parts, height, width) for parts in row] for row in coefficients])


def decode_coefficients(stream, code, slices, components, height, width, cells=None):
    """Lists [slice][component] of {(level, kind): rows of coefficients}."""
    coder = Coder(stream)
    found = [[{} for _ in range(components)] for _ in range(slices)]
    symbols = [[{} for _ in range(components)] for _ in range(slices)]
    for level, kind, rows, columns in bands(height, width):
        for s in range(slices):
            steps = {0: band_step(code, level, kind)}, [[0] * columns for _ in range(rows)]
            if cells is not None and kind != LOW:
                values = [[value_of(cells[s], level, y, x) for x in range(columns)] for y in range(rows)]
                codes = {v: min(code + 32 * (v - 1), 8191) for row in values for v in row if v}
                steps = {v: band_step(one, level, kind) for v, one in codes.items()}, values
            for c in range(components):
                before = symbols[s][c - 1][level, kind] if c else None
                q, values = decode_band(coder, symbols[s][c], before, level, kind, rows, columns, steps)
                symbols[s][c][level, kind], found[s][c][level, kind] = q, values
    if coder.bits.at < len(stream):
        raise ValueError("bytes left over")
    return found


def decode_band(coder, plane, before, level, kind, rows, columns, steps):
    """Symbols and coefficients of a band; `plane` has the symbols of the plane's bands so far."""
    steps, quality = steps
    q, out = Symbols(), [[0] * columns for _ in range(rows)]
    if not coder.one("filled", 2 * kind + int(before is not None and any(before.values()))):
        return q, out
    v, state = {}, 0
    for y in range(rows):
        for x in range(columns):
            z, map_value = state % 2, quality[y][x]
            if map_value not in steps:
                continue
            step = steps[map_value]
            symbol, rank = decode_symbol(coder, q, plane, before, level, kind, z, y, x, map_value)
            a = abs(symbol)
            if a:
                h = 2 * a - z
                size = common(h, map_value) if map_value else h
                q[y, x] = size if symbol > 0 else -size
            if kind == LOW:
                v[y, x] = bits32(symbol + median(v, y, x))
                out[y][x] = bits32((v[y, x] * step + (1 << 15)) >> 16)
                continue
            state = NEXT[state][symbol % 2]
            if a:
                o = OFFSETS[z if a == 1 else min(a, 3)][max(16, min(45, rank)) - 16]
                size = ((128 * h - o) * step + (1 << 23)) >> 24
                out[y][x] = bits32(size if symbol > 0 else -size)
    return q, out


def median(v, y, x):
    if y == 0:
        return v[y, x - 1] if x else 0
    if x == 0:
        return v[y - 1, x]
    left, upper = v[y, x - 1], v[y - 1, x]
    return sorted((left, upper, left + upper - v[y - 1, x - 1]))[1]


def decode_symbol(coder, q, plane, before, level, kind, z, y, x, map_value):
    """Return the symbol of a place and the rank of the size that was expected."""

    def a(dy, dx):
        return abs(q[y + dy, x + dx])

    near = 5 * (a(0, -1) + a(-1, 0)) + 2 * (a(-1, -1) + a(-1, 1)) + a(0, -2) + a(-2, 0)
    total, shares = 2 * near, 2
    coarse = other = behind = 0
    if (level + 1, kind) in plane:
        coarse = plane[level + 1, kind].mean(y >> 1, x >> 1)
        total, shares = total + coarse, shares + 2
    details = [plane[level, one].mean(y, x) for one in range(HORIZONTAL, kind)]
    total, shares = total + sum(details), shares + len(details)
    if details:
        other = details[0] if kind == VERTICAL else (details[0] + details[1]) >> 1
    if before is not None:
        behind = before.mean(y, x)
        total, shares = total + behind, shares + 1
    size = own(total, map_value) // shares
    near, coarse, other, behind = (own(value, map_value) for value in (near, coarse, other, behind))
    rank = rank_of(2 * size)
    n, c, o, b = (rank_of(value) // 3 for value in (near, coarse, other, behind))
    u = max(0, size.bit_length() - 6)

    def t(value, most):
        return min((value + 1) >> (u + 1), most)

    def tt(value):
        return min(((value >> (u + 1)) + 7) >> 4, 2)

    near_four = [t(own(a(*place), map_value), 2) for place in ((0, -1), (-1, 0), (-1, -1), (-1, 1))]
    shape = (*near_four, tt(coarse), tt(other), tt(behind))
    nearest = t(own(a(0, -1), map_value), 5), t(own(a(-1, 0), map_value), 5), tt(coarse)
    i = 0
    if total == 0 and kind != LOW:
        if not coder.one("quiet", level, kind, z):
            return 0, rank
        i = 1
    while i < 14:
        j = min(i, 2)
        names = [
            ("size", rank, i),
            ("coarse", n, c, j),
            ("other", o, n, j),
            ("shape", shape) if i == 0 else ("later", nearest, i),
            ("band", level, kind, rank >> 1, j),
            ("before", rank, b, j),
        ]
        if not coder.mixed((z, min(i, 3), rank // 3), [(z, *name) for name in names]):
            break
        i += 1
    high = i
    if i == 14:
        length = 0
        while coder.one("escape", length):
            length += 1
            if length == 27:
                raise ValueError("an escape out of range")
        rest = 1
        for _ in range(length):
            rest = 2 * rest + coder.even()
        high = rest + 13
    lower = 0
    for n in range(u):
        if n == 0:
            bit = coder.one("low", rank, 3 if high == 0 else 0)
        elif n == 1:
            bit = coder.one("low", rank, 1 + lower)
        else:
            bit = coder.even()
        lower = 2 * lower + bit
    size = (high << u) + lower
    if size > MAX_SYMBOL:
        raise ValueError("a symbol out of range")
    if size:
        signs = [np.sign(q[y, x - 1]), np.sign(q[y - 1, x]), 0 if before is None else np.sign(before[y, x])]
        if coder.one("sign", kind, *(int(sign) for sign in signs)):
            size = -size
    return size, rank


def inverse(parts, height, width):
    """Section "Inverse transform" of one plane's {(level, kind): rows}."""
    low = sizes(height, width)
    plane = parts[len(low) - 1, LOW]
    for level in range(len(low) - 1, 0, -1):
        h, w = low[level - 1]
        joined = [[0] * w for _ in range(h)]
        for kind, part in enumerate((plane, *(parts[level, kind] for kind in (HORIZONTAL, VERTICAL, DIAGONAL)))):
            for y, row in enumerate(part):
                for x, value in enumerate(row):
                    joined[2 * y + kind // 2][2 * x + kind % 2] = value
        joined = [joined_numbers(row) for row in joined]
        columns = [joined_numbers(column) for column in zip(*joined, strict=True)]
        plane = [list(row) for row in zip(*columns, strict=True)]
    return plane


def joined_numbers(numbers):
    """The five steps on a row or column."""
    z = list(numbers)
    last = len(z) - 1
    for i in range(0, len(z), 2):
        z[i] = bits32((20638896 * z[i] + (1 << 23)) >> 24)
    for first, factor in ((0, 7440810), (1, 14812789), (0, -888859), (1, -26610918)):
        for i in range(first, len(z), 2):
            before, after = z[i - 1 if i else 1], z[i + 1 if i < last else i - 1]
            z[i] = bits32(z[i] - ((factor * (before + after) + (1 << 23)) >> 24))
    return z


def to_bands(components, matrix):
    """Bands of a pixel from its components and the rows of a matrix in 1/16384, or None, in Python's integers."""
    if matrix is None:
        return [bits32(int(value) + 8) >> 4 for value in components]
    m = np.array(matrix, object)
    count = len(m)
    fine = ((3 * (1 << 28) * np.eye(count, dtype=int).astype(object) - m @ m.T) @ m + (1 << 22)) // (1 << 23)
    most = (1 << 28) - 1
    clipped = [max(-most, min(most, int(value))) for value in components]
    totals = [
        sum(value * int(row[band]) for value, row in zip(clipped, fine, strict=True)) for band in range(len(m[0]))
    ]
    return [(total + (1 << 23)) >> 24 for total in totals]


def to_samples(bands, dtype, ranges):
    """Samples of a pixel of a dtype from its bands; `ranges` are pairs of numbers."""
    if dtype != "f4":
        limits = np.iinfo(dtype)
        return [max(limits.min, min(limits.max, band)) for band in bands]
    samples = []
    for band, (low, high) in zip(bands, ranges, strict=True):
        samples.append(max(low, min(high, float(np.float32(band * (high - low) / (1 << 20) + low)))))
    return samples
