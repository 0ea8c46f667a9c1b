"""Second decoders of masks and residuals, in plain Python, written from docs/residual.md alone.

Slow and plain on purpose.  Of the package they share nothing; the arithmetic decoder is that of `reference_coder`.
"""

import re
from pathlib import Path

from tests.payload.reference_coder import RECIPROCAL, SQUASH, STRETCH, Bits

AROUND = ((0, 0), (0, -1), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))
#: (plane, offset); plane 3 is the mean of the rows above
TAPS = (
    [(0, (0, dx)) for dx in (-1, -2, -3)]
    + [(0, (-1, dx)) for dx in (-3, -2, -1, 1, 2, 3)]
    + [(0, (-2, dx)) for dx in range(-3, 4)]
    + [(0, (-3, 0)), (3, (0, 0))]
    + [(plane, offset) for plane in (1, 2) for offset in AROUND]
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
            w[i] += (a[i] * ((65535 if bit else 0) - p) * 16 + 131072) >> 18
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


def take_varint(data):
    value = shift = 0
    while True:
        byte, data = data[0], data[1:]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, data


class Plane:
    """A band of a slice: rows with a border of 3 columns, and what is known of its errors."""

    def __init__(self, height, width):
        self.width = width
        self.rows = {y: [0] * (width + 6) for y in range(-3, height + 1)}
        self.e, self.e1 = {}, {}

    def at(self, y, x):
        return self.rows[y][x + 3]


class Means:
    """Section "Surroundings": means of the rows above."""

    def __init__(self):
        self.values = None

    def add(self, plane, y):
        last = plane.width - 1
        for x in range(plane.width):
            box = 16 * sum(plane.at(y, max(0, min(last, x + i))) for i in range(-8, 9)) // 17
            if self.values is None or len(self.values) == x:
                self.values = [*(self.values or []), box]
            else:
                self.values[x] += (box - self.values[x]) >> 3


class Shared:
    """What all bands share."""

    def __init__(self, coder, plain, step):
        self.coder, self.plain, self.step = coder, plain, step
        self.weights = [768, 0, 0, 0, 0, -512, 256] + [0] * 27
        self.mean_errors = {}


def decode_residual(data, shape, step=1, mask=None):
    """Dictionary (s, y, x, c) -> r; ``mask`` is indexed [s][y][x][c]."""
    slices, height, width, bands = shape
    lows, tops = [], []
    for _ in range(bands):
        low, data = take_varint(data)
        lows.append(-(low + 1) // 2 if low & 1 else low // 2)
        top, data = take_varint(data)
        tops.append(top)
    length, data = take_varint(data)
    if length > len(data) or max(tops) >= 1 << 24:
        raise ValueError("the section ends early, or a range is too large")
    first, later = starts()

    def start(name):
        if name[0] in ("zero", "high"):
            level = name[1] if name[1] < 30 else 26 + (name[1] - 26) % 4
            return (first if name[-1] == 0 else later)[level] << 14, 6
        return 1 << 21, 0

    shared = Shared(Coder(data[:length], start), Plain(data[length:]), step)
    planes, filters = {}, [[0] * 12 for _ in range(bands)]
    for s in range(slices):
        for c in range(bands):
            plane = planes[s, c] = Plane(height, width)
            if not tops[c]:
                continue
            mode = shared.plain.get(2)
            if mode == 3 or (mode == 1 and c == 0) or (mode == 2 and s == 0):
                raise ValueError("impossible references")
            references = []
            if mode == 1:
                references = [planes[s, b] for b in (c - 1, c - 2) if b >= 0]
            elif mode == 2:
                references = [planes[s, c - 1], planes[s - 1, c]] if c else [planes[s - 1, 0]]
            shared.weights = decode_weights(shared, (18, 26, 34)[len(references)])
            if s == 0 and c >= 2:
                filters[c] = list(filters[c - 1])
            covered = [[mask is not None and mask[s][y][x][c] for x in range(width)] for y in range(height)]
            decode_band(shared, plane, references, filters[c], tops[c], covered)
    shared.coder.finish()
    shared.plain.finish()
    places = ((s, y, x, c) for s in range(slices) for y in range(height) for x in range(width) for c in range(bands))
    return {(s, y, x, c): planes[s, c].at(y, x) + lows[c] for s, y, x, c in places}


def decode_weights(shared, used):
    """Section "Weights"."""
    coder, weights, last = shared.coder, [0] * 34, 1
    if not coder.one(("new",)):
        return shared.weights[:used] + [0] * (34 - used)
    for t in range(used):
        last = int(coder.one(("not zero", last)))
        if last:
            n = 0
            while coder.one(("length", n)):
                n += 1
                if n == 12:
                    raise ValueError("a weight out of range")
            bits = shared.plain.get(n + 1)
            size = (1 << n) + (bits >> 1)
            weights[t] = -size if bits & 1 else size
    return weights


def decode_band(shared, plane, references, f, top, covered):
    """Section "Surroundings"."""
    width, first, means = plane.width, True, Means()
    for y, mask in enumerate(covered):
        row = plane.rows[y]
        row[:3] = [0 if first else plane.at(y - 1, 0)] * 3
        last = 0
        for x in range(width):
            if mask[x]:
                row[x + 3] = 0 if first else plane.at(y - 1, x)
            else:
                row[x + 3] = last = sample(shared, plane, references, f, top, means, (y, x), last if first else None)
        if all(mask):
            if not first:
                row[width + 3 :] = [row[width + 2]] * 3
                means.add(plane, y)
            continue
        left = None
        for x in range(width):
            if not mask[x]:
                left = row[x + 3]
            elif left is not None:
                row[x + 3] = left
        start = mask.index(False)
        row[3 : start + 3] = [row[start + 3]] * start
        row[width + 3 :] = [row[width + 2]] * 3
        if first:
            row[:3] = [row[3]] * 3
            for above in range(-3, y):
                plane.rows[above] = list(row)
        means.add(plane, y)
        first = False
    plane.rows[len(covered)] = list(plane.rows[len(covered) - 1])


def sample(shared, plane, references, f, top, means, place, in_first_row):
    """Sections "Prediction" to "Binarisation"; ``in_first_row`` is the last sample of a first row, else None."""
    (y, x), coder, step = place, shared.coder, shared.step
    reference = references[0] if references else None

    def limited(value):
        return max(0, min(16 * top, value))

    if in_first_row is not None:
        b = 16 * in_first_row
    else:
        total = 0
        planes = [plane, *references]
        for (which, (dy, dx)), weight in zip(TAPS, shared.weights, strict=True):
            if which == 3:
                total += weight * ((means.values[x] >> 4) - plane.at(y - 1, x))
            elif which < len(planes):
                total += weight * (planes[which].at(y + dy, x + dx) - planes[which].at(y - 1, x))
        b = limited(16 * plane.at(y - 1, x) + (total >> 6))

    def error(values, dy, dx):
        return values.get((y + dy, x + dx), 0)

    u = [error(plane.e1, *o) for o in ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-1, -2))]
    for offset in ((-1, 0), (0, 0), (0, -1), (0, 1), (1, 0)):
        u.append(error(reference.e1, *offset) if reference else 0)
    a = limited(b + (sum(p * q for p, q in zip(f, u, strict=True)) >> 16))

    def big(dy, dx):
        return abs(error(plane.e, dy, dx))

    north = 2 * big(-1, 0) + big(-1, -1) + big(-1, 1) + big(-2, 0)
    before = 0
    if reference:
        cross = [abs(error(reference.e, *o)) for o in ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))]
        before = 5 * (cross[0] + sum(cross)) >> 5
    size = ((2 if reference else 3) * (north + 2 * big(0, -1) + big(0, -2)) + 6 * before) >> 3
    level = min(local_level(size * (65536 // step) >> 16), 99)
    near = min(local_level(north + 2 * before) >> 1, 31)
    k = max(0, (level - 22) >> 2)

    w, n = plane.at(y, x - 1), plane.at(y - 1, x)
    values = (
        w,
        n,
        plane.at(y - 1, x + 1),
        plane.at(y - 1, x - 1),
        2 * w - plane.at(y, x - 2),
        2 * n - plane.at(y - 2, x),
    )
    signs = sum((16 * value > a) << i for i, value in enumerate(values))
    mean_error = shared.mean_errors.setdefault((signs, level >> 2), [0, 6])
    m = limited(a + (mean_error[0] >> 8))

    c = (m + 8) >> 4
    j = m - 16 * c
    flip, j = j < 0, abs(j)

    def value_at(p):
        return min(local_level(p), 78) if p >= 0 else 79

    def sign():
        contexts = [("sign", level, j), ("sign by value", min(level >> 1, 31), value_at(c), flip)]
        return coder.mixed((level, "sign"), [*contexts, ("sign by signs", signs, flip)])

    negative = sign() if k else None
    v = 0
    while v < 20:
        side = 2 if negative is None else int(negative != flip)
        value = value_at(c + (-1 if side == 1 else 1) * (v * step << k))
        two = ("zero", level, j, v), ("near", near, min(local_level(big(0, -1)) >> 2, 15), v)
        if v >= 2:
            two = ("high", level, v), ("far", near, v)
        if not coder.mixed((level, v), [*two, ("value", value, side, min(k, 15))]):
            break
        if v == 0 and not k:
            negative = sign()
        v += 1
    if v == 20:
        n = 0
        while coder.one(("escape", n)):
            n += 1
            if n == 26:
                raise ValueError("an escape out of range")
        v = 19 + (1 << n) + shared.plain.get(n)
    if k:
        v = 2 * v + int(coder.one(("low", level, min(v, 1))))
        v = (v << (k - 1)) + shared.plain.get(k - 1)
        v += negative
    d = -v if negative else v
    r = max(0, min(top, c - d * step if flip else c + d * step))
    e = 16 * r - a
    plane.e[place], plane.e1[place] = 16 * r - m, 16 * r - b
    mean_error[0] += (((e << 8) - mean_error[0]) * RECIPROCAL[mean_error[1]]) >> 16
    mean_error[1] = min(mean_error[1] + 1, 255)
    gain = (e << 15) // (4096 + sum(i * i for i in u))
    for i in range(12):
        f[i] = clip(f[i] + ((gain * u[i] + 32) >> 6), 1 << 20)
    return r
