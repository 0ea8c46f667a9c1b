"""Second decoders of masks and residuals, in plain Python, written from docs/residual.md alone.

Slow and plain on purpose.  Of the package they share nothing; the arithmetic decoder is that of `reference_coder`.
"""

import re
from pathlib import Path

from tests.payload.reference_coder import RECIPROCAL, SQUASH, STRETCH, Bits

M = (1 << 20) - 1
EIGHT = ((0, -1), (-1, 0), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))
OWN = ((0, -1), (0, -2), (-1, 0), (-1, -1), (-1, 1), (-2, 0), (-1, -2), (-1, 2), (-2, -1), (-2, 1))
#: (what, bands before, offset)
TAPS = (
    [("r", 0, o) for o in OWN]
    + [("g", 0, o) for o in EIGHT]
    + [("r", 1, o) for o in ((0, 0), *EIGHT)]
    + [("g", 1, o) for o in EIGHT]
    + [("r", 2, o) for o in ((0, 0), *EIGHT[:4])]
    + [("g", 2, o) for o in EIGHT]
)


def clip(value, most):
    return max(-most, min(most, value))


class Coder:
    """Contexts by name, made as they are first used."""

    def __init__(self, data, start):
        if data[-1:] == b"\0":
            raise ValueError("the stream ends in a zero byte")
        self.bits, self.start, self.states, self.mixers = Bits(data), start, {}, {}

    def state(self, name):
        return self.states.setdefault(name, list(self.start(name)))

    def learn(self, name, one):
        state = self.state(name)
        state[0] += (((4194303 if one else 0) - state[0]) * RECIPROCAL[state[1]]) >> 16
        state[1] = min(state[1] + 1, 255)

    def one(self, name, least=16):
        bit = self.bits.bit(max(least, min(65536 - least, self.state(name)[0] >> 6)))
        self.learn(name, bit)
        return bit

    def mixed(self, mixer, names):
        w = self.mixers.setdefault(mixer, [30000, 18000, 18000])
        a = [STRETCH[self.state(name)[0] >> 8] for name in names]
        p = SQUASH[clip(sum(x * y for x, y in zip(w, a, strict=True)) >> 16, 3071) + 3071]
        bit = self.bits.bit(p)
        for i in range(3):
            w[i] += (a[i] * ((65535 if bit else 0) - p) * 8 + 131072) >> 18
        for name in names:
            self.learn(name, bit)
        return bit

    def finish(self):
        if self.bits.at < len(self.bits.data):
            raise ValueError("bytes left over")


def decode_mask(data, shape):
    """Nested lists [s][y][x] of 0 and 1."""
    slices, height, width = shape

    def start(index):
        if index >= 2048:
            return 1 << 21, 0
        v = 2 * (index & 1) + 2 * (index >> 4 & 1) + (index >> 5 & 1) + (index >> 3 & 1)
        return (1 + 10 * v) << 16, 0

    coder = Coder(data, start)
    out, before = [], [[0] * width for _ in range(height)]
    for _ in range(slices):
        if coder.one(2048, 1):
            now = [list(row) for row in before]
        elif coder.one(2049, 1):
            value = int(coder.one(2050, 1))
            now = [[value] * width for _ in range(height)]
        else:
            now = [[0] * width for _ in range(height)]

            def at(y, x, now=now):
                return now[y][x] if y >= 0 and 0 <= x < width else 0

            for y in range(height):
                for x in range(width):
                    index = before[y][x]
                    places = [(y - 2, x - 1), (y - 2, x), (y - 2, x + 1)]
                    places += [(y - 1, x + i) for i in range(-2, 3)] + [(y, x - 2), (y, x - 1)]
                    for place in places:
                        index = 2 * index + at(*place)
                    now[y][x] = int(coder.one(index, 1))
        out.append(now)
        before = now
    coder.finish()
    return out


class Plain:
    """Section "Residual": plain bits."""

    def __init__(self, data):
        self.bits = [byte >> i & 1 for byte in data for i in range(8)]
        self.at = 0

    def get(self, n):
        if self.at + n > len(self.bits):
            raise ValueError("plain bits end early")
        self.at += n
        return sum(b << i for i, b in enumerate(self.bits[self.at - n : self.at]))

    def finish(self):
        if len(self.bits) - self.at > 7 or any(self.bits[self.at :]):
            raise ValueError("plain bits left over")


def local_level(n):
    steps = 0
    while n >= 4096:
        n >>= 4
        steps += 16
    return (n**4).bit_length() + steps if n else 0


def starts():
    """The two tables of the page."""
    text = (Path(__file__).parents[2] / "docs" / "residual.md").read_text()
    block = re.search(r"<!-- starts -->\s+```text\n(.*?)```", text, re.S).group(1)
    return [[int(v) for v in line.split()] for line in block.splitlines()]


def decode_residual(data, shape, g):
    """Dictionary (s, y, x, c) -> r; ``g`` is indexed [s][y][x][c]."""
    slices, height, width, bands = shape
    length = shift = 0
    while True:
        byte, data = data[0], data[1:]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if length > len(data):
        raise ValueError("the section ends early")
    first, later = starts()

    def start(name):
        if name[0] in ("zero", "high"):
            level = name[1] if name[1] < 30 else 26 + (name[1] - 26) % 4
            return (first if name[-1] == 0 else later)[level] << 14, 6
        return 1 << 21, 0

    coder, plain = Coder(data[:length], start), Plain(data[length:])
    weights, shifts = decode_weights(coder, plain, bands)
    r, e, e1 = {}, {}, {}
    filters = [[0] * 8 for _ in range(bands)]
    for s in range(slices):
        for c in range(bands):
            if s == 0 and c >= 2:
                filters[c] = list(filters[c - 1])
            for y in range(height):
                for x in range(width):
                    sample(coder, plain, weights[c], shifts[c], filters[c], g, r, e, e1, (s, y, x, c), (height, width))
    coder.finish()
    plain.finish()
    return r


def decode_weights(coder, plain, bands):
    """Section "Fixed filter"."""
    weights, shifts = [], []
    for c in range(bands):
        shifts.append(plain.get(4))
        if not coder.one(("new",)):
            weights.append(list(weights[-1]) if c else [0] * 48)
            continue
        mine, last = [0] * 48, 1
        for t in range((18, 35, 48)[min(c, 2)]):
            last = int(coder.one(("not zero", last)))
            if last:
                n = 0
                while coder.one(("length", n)):
                    n += 1
                    if n == 11:
                        raise ValueError("a weight out of range")
                bits = plain.get(n + 1)
                size = (1 << n) + (bits >> 1)
                mine[t] = -size if bits & 1 else size
        weights.append(mine)
    return weights, shifts


def sample(coder, plain, weights, shift, f, g, r, e, e1, place, size):
    """Sections "Prediction" to "Binarisation"."""
    s, y, x, c = place
    height, width = size

    def near(values, dy, dx, back=0):
        return values.get((s, y + dy, x + dx, c - back), 0) if c >= back else 0

    def slope_to(back, dy, dx):
        ty, tx = max(0, min(height - 1, y + dy)), max(0, min(width - 1, x + dx))
        return int(g[s][ty][tx][c - back]) - int(g[s][y][x][c - back])

    used = (18, 35, 48)[min(c, 2)]
    inputs = [near(r, *o, back) if what == "r" else slope_to(back, *o) for what, back, o in TAPS[:used]]
    b = clip(sum(w * i for w, i in zip(weights, inputs, strict=False)) >> 4, 16 * M)
    u = [near(e1, *o) for o in ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2))]
    u += [near(e1, *o, 1) for o in ((-1, 0), (0, 0), (0, -1))]
    m = clip(b + (sum(p * q for p, q in zip(f, u, strict=True)) >> 16), 16 * M)

    def big(dy, dx, back=0):
        return abs(near(e, dy, dx, back))

    north = 2 * big(-1, 0) + big(-1, -1) + big(-1, 1) + big(-2, 0)
    before = (5 * (2 * big(0, 0, 1) + big(0, -1, 1) + big(0, 1, 1) + big(-1, 0, 1) + big(1, 0, 1))) >> 5
    slope = sum(abs(i) for i in inputs[10:14])
    q = 2 if c else 3
    level = min(
        local_level((q * (north + 2 * big(0, -1) + big(0, -2)) + 8 * before + ((16 * slope) >> shift)) >> 3), 99
    )
    k = max(0, (level - 22) >> 2)
    centre = (m + 8) >> 4
    j = m - 16 * centre
    flip, j = j < 0, abs(j)
    negative = coder.one(("sign", level, j)) if k else False
    contexts = (
        ("near", min(local_level(north + 2 * before) >> 1, 31), min(local_level(big(0, -1)) >> 2, 15)),
        ("other", min(local_level(before) >> 1, 31), min(local_level(slope) >> 1, 15)),
    )
    v = 0
    while v < 20:
        if v < 2:
            bit = coder.mixed((level, v), [("zero", level, j, v)] + [(*name, v) for name in contexts])
        else:
            bit = coder.one(("high", level, v))
        if not bit:
            break
        if v == 0 and k == 0:
            negative = coder.one(("sign", level, j))
        v += 1
    if v == 20:
        n = 0
        while coder.one(("escape", n)):
            n += 1
            if n == 22:
                raise ValueError("an escape out of range")
        v = 19 + (1 << n) + plain.get(n)
    if k:
        v = 2 * v + int(coder.one(("low", level, min(v, 1))))
        v = (v << (k - 1)) + plain.get(k - 1)
        v += negative
    d = -v if negative else v
    value = centre - d if flip else centre + d
    if abs(value) > M:
        raise ValueError("a sample out of range")
    r[place], e[place], e1[place] = value, 16 * value - m, 16 * value - b
    gain = (e[place] << 15) // (4096 + sum(i * i for i in u))
    for i in range(8):
        f[i] = clip(f[i] + ((gain * u[i] + 32) >> 6), 1 << 20)
