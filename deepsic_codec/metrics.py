"""Differences between original and decoded images: PSNR and MS-SSIM. Needs NumPy only."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]

# Wang, Simoncelli, Bovik 2003: exponents per scale, 11-tap Gaussian window, stabilising constants.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(original: ArrayLike, decoded: ArrayLike, peak: float = 255.0) -> float:
    """Return the peak signal-to-noise ratio over all samples together.

    Parameters
    ----------
    original, decoded : array
        Of equal shape.
    peak : float
        Largest sample value.

    Returns
    -------
    float
        In dB; infinity for equal arrays.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    a, b = _pair(original, decoded)
    error = float(np.mean(np.square(a - b), dtype=np.float64))
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def errors(original: ArrayLike, decoded: ArrayLike) -> tuple[float, float]:
    """Return the root mean square error and the largest error, in units of the samples; NaN without samples."""
    error = np.abs(np.asarray(original, np.float64) - np.asarray(decoded, np.float64))
    return (float(np.sqrt(np.square(error).mean())), float(error.max())) if error.size else (float("nan"),) * 2


def luma(rgb: ArrayLike) -> Floats:
    """Return the luma (BT.601, full range, not rounded) of RGB samples (..., 3): float32 (...), scaled as the input."""
    return np.asarray(rgb, np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def ms_ssim(original: ArrayLike, decoded: ArrayLike, peak: float = 255.0) -> float:
    """Return the multi-scale structural similarity of two images, from 0 to 1, which means equal.

    The similarity is computed for each channel and then averaged, as is usual in learned compression. Windows lie
    within the image, without padding. An odd last row or column is left out when the scale is halved.

    Parameters
    ----------
    original, decoded : array (H, W) or (H, W, C)
        Both edges have at least 176 pixels, so that the window fits the fifth scale.
    peak : float
        Largest sample value.

    Raises
    ------
    ValueError
        If the shapes differ or the image is too small.
    """
    a, b = _pair(original, decoded)
    if a.ndim == 2:
        a, b = a[..., None], b[..., None]
    smallest = WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1)
    if a.ndim != 3 or min(a.shape[:2]) < smallest:
        raise ValueError(f"MS-SSIM needs (H, W[, C]) with both edges >= {smallest}, got {a.shape}")
    result = np.ones(a.shape[2])
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            a, b = _halve(a), _halve(b)
        luminance, structure = _ssim_terms(a, b, peak)
        last = scale == len(SCALE_WEIGHTS) - 1
        term = (luminance * structure if last else structure).mean(axis=(0, 1), dtype=np.float64)
        result *= np.maximum(term, 0) ** weight  # a negative mean has no real power
    return float(result.mean())


def _pair(original: ArrayLike, decoded: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(original, np.float32), np.asarray(decoded, np.float32)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    return a, b


def _ssim_terms(a: Floats, b: Floats, peak: float) -> tuple[Floats, Floats]:
    """Return the maps of luminance and of contrast and structure, (H-10, W-10, C) each."""
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    square_a, square_b, product = mean_a * mean_a, mean_b * mean_b, mean_a * mean_b
    variances = _blur(a * a + b * b) - square_a - square_b
    covariance = _blur(a * b) - product
    luminance = (2 * product + c1) / (square_a + square_b + c1)
    return luminance, (2 * covariance + c2) / (variances + c2)


def _blur(x: Floats) -> Floats:
    """Return the Gaussian mean over the window, at positions where the window lies within the image."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    taps = np.exp(-(offsets**2) / (2 * SIGMA**2))
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        n = x.shape[axis] - WINDOW + 1
        part = [x[i : i + n] if axis == 0 else x[:, i : i + n] for i in range(WINDOW)]
        total = part[WINDOW // 2] * taps[WINDOW // 2]
        for i in range(WINDOW // 2):  # the window is symmetric
            total += (part[i] + part[WINDOW - 1 - i]) * taps[i]
        x = total
    return x


def _halve(x: Floats) -> Floats:
    x = x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2]
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
