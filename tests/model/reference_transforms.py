"""Synthesis and analysis written from docs/integer-transforms.md, plainly, in NumPy's 64-bit integers."""

import numpy as np


def layer(t, name, a, low, high, quality=None):
    w = t[f"{name}.weight"].astype(np.int64).reshape(len(t[f"{name}.weight"]), -1)
    b = t[f"{name}.bias"]
    b = b[quality - 1] if b.ndim == 2 else b
    return np.clip((a @ w.T + b) >> t[f"{name}.shift"].astype(np.int64), low, high)


def digits(v):
    high = (v + 64) >> 7
    return high, v - 128 * high


def read(h):
    return np.clip((h + 8) >> 4, -128, 127)


def block(t, name, h, quality):
    rows, columns, _ = h.shape
    padded = np.pad(h, ((1, 1), (1, 1), (0, 0)))
    w = t[f"{name}.spatial.weight"].astype(np.int64)
    total = sum(padded[y : y + rows, x : x + columns] * w[:, 0, y, x] for y in range(3) for x in range(3))
    a = np.clip((total + t[f"{name}.spatial.bias"]) >> t[f"{name}.spatial.shift"].astype(np.int64), -128, 127)
    down = layer(t, f"{name}.down", layer(t, f"{name}.up", a, 0, 255, quality), -32768, 32768)
    return np.clip(h + down, -2047, 2047)


def modulate(t, name, v, quality):
    m, b = (t[f"{name}.{part}"][quality - 1].astype(np.int64) for part in ("scale", "offset"))
    return np.clip((v * m + b) >> 8, -2047, 2047)


def shuffle(v, n):
    rows, columns, channels = v.shape
    v = v.reshape(rows, columns, channels // n**2, n, n).transpose(0, 3, 1, 4, 2)
    return v.reshape(rows * n, columns * n, -1)


def unshuffle(v, n):
    rows, columns, channels = v.shape
    v = v.reshape(rows // n, n, columns // n, n, channels).transpose(0, 2, 4, 1, 3)
    return v.reshape(rows // n, columns // n, -1)


def steps(table, hundredths):
    table = table.astype(np.int64)
    i = min(max(hundredths // 100, 1), 99)
    p = hundredths - 100 * i
    return (table[i - 1] * (100 - p) + table[i] * p + 50) // 100


def whole(hundredths):
    return min(max((hundredths + 50) // 100, 1), 100)


def synthesise(t, table, symbols, hundredths):
    """Symbols (h,w,C) -> pixels (16h,16w,3) in 64ths."""
    quality = whole(hundredths)
    latents = np.clip((symbols.astype(np.int64) * steps(table, hundredths) + 128) >> 8, -16319, 16319)
    (wh, wl), (ah, al) = digits(t["linear.weight"].astype(np.int64).reshape(768, -1)), digits(latents)
    total = 128 * (ah @ wh.T) + ah @ wl.T + al @ wh.T
    shift = t["linear.shift"].astype(np.int64) - 7
    linear = np.clip((total + (t["linear.bias"].astype(np.int64) >> 7)) >> shift, -16383, 16383)
    z = np.floor(latents * 2.0 ** (t["normaliser"].astype(float) + 1) + 0.5).astype(np.int64)
    h = modulate(t, "mod16", layer(t, "stem", np.clip(z, -16319, 16319), -4095, 4095), quality)
    for i in range(sum(k.startswith("blocks16") and k.endswith("up.weight") for k in t)):
        h = block(t, f"blocks16.{i}", h, quality)
    h = modulate(t, "mod8", shuffle(layer(t, "expand", read(h), -4095, 4095), 2), quality)
    for i in range(sum(k.startswith("blocks8") and k.endswith("up.weight") for k in t)):
        h = block(t, f"blocks8.{i}", h, quality)
    rest = layer(t, "out", read(h), -16383, 16383)
    return np.clip(shuffle(linear, 16) + shuffle(rest, 8), -8192, 8128) + 8192


def analyse(t, pixels, hundredths):
    """Pixels (H,W,3) in 64ths, sides multiples of 16 -> latents."""
    quality = whole(hundredths)
    g = ((pixels.astype(np.int64) + 32) >> 6) - 128
    f = pixels - 64 * (g + 128)
    h = modulate(t, "mod8", layer(t, "stem", unshuffle(g, 8), -4095, 4095), quality)
    for i in range(sum(k.startswith("blocks8") and k.endswith("up.weight") for k in t)):
        h = block(t, f"blocks8.{i}", h, quality)
    h = modulate(t, "mod16", layer(t, "reduce", unshuffle(read(h), 2), -4095, 4095), quality)
    for i in range(sum(k.startswith("blocks16") and k.endswith("up.weight") for k in t)):
        h = block(t, f"blocks16.{i}", h, quality)
    w = t["linear.weight"].astype(np.int64).reshape(len(t["linear.weight"]), -1)
    total = unshuffle(g, 16) @ w.T + 2 * unshuffle(f, 16) @ digits(w)[0].T
    linear = (total + t["linear.bias"]) >> t["linear.shift"].astype(np.int64)
    return np.clip(linear + layer(t, "out", read(h), -16319, 16319), -16319, 16319)


def scores(t, latents, quality):
    """One cell of latents (h,w,C), at most 4x4, at a whole quality -> scores (classes,)."""
    v = np.sign(latents) * t["compand"].astype(np.int64)[np.abs(latents)]
    h = np.maximum(modulate(t, "mod", layer(t, "stem", v, -4095, 4095), quality), 0)
    for i in range(sum(k.startswith("blocks") and k.endswith("up.weight") for k in t)):
        h = block(t, f"blocks.{i}", h, quality)
    n = h.shape[0] * h.shape[1]
    mean, peak = (2 * h.sum((0, 1)) + n) // (2 * n), h.max((0, 1))
    hidden = layer(t, "hidden", read(np.concatenate([mean, peak])), 0, 255)
    return t["score"][layer(t, "out", hidden, -2047, 2047) + 2047]
