"""Distortion that refinement lowers: sums of squares of weighted errors.

With `"mse"` all errors weigh the same. With `"ms-ssim"` they count at the five scales of MS-SSIM (Wang, Simoncelli and
Bovik 2003). Its contrast and structure term falls short of one by exactly s / (v + w + C), for an error of variance s
in a window in which original and decoded image have variances v and w. So an error counts less its mean over the
window, and w is taken to be v. A sum of squares can be split by window, and its curvature can be measured with random
signs.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepsic_codec.axes import ceil_div
from deepsic_codec.metrics import K2, SCALE_WEIGHTS, SIGMA, WINDOW
from deepsic_codec.payload.constants import LATENT_STRIDE

#: MS-SSIM: weights of plain squared errors, without which colours of flat parts drift, and of weighted errors.
PLAIN, SCALED = 0.1, 1500.0


class Distortion:
    """Distortion of a batch of images.

    Parameters
    ----------
    images : Tensor
        Grey levels float32 (N,H,W,3).
    tune : str
        `"mse"` or `"ms-ssim"`.

    Attributes
    ----------
    local : Tensor
        Weight of errors around each latent, (N,h,w,1); 1 for plain squared errors.
    """

    def __init__(self, images: Tensor, tune: str) -> None:
        self.images, self.tune = images, tune
        #: Roots of the weights at each scale, (N,3,H,W), (N,3,H/2,W/2) and so on; none for plain errors.
        self._roots: list[Tensor] = []
        n, height, width, _ = images.shape
        self.local = images.new_ones(n, ceil_div(height, LATENT_STRIDE), ceil_div(width, LATENT_STRIDE), 1)
        if tune == "mse":
            return
        weights, x = [], images.permute(0, 3, 1, 2)
        for scale, share in enumerate(SCALE_WEIGHTS):
            variance = (_blur(x.square()) - _blur(x).square()).clamp(min=0)
            weight = _blur(1 / (2 * variance + (255 * K2) ** 2))
            weights.append(SCALED * share * 4**scale * weight)
            x = _pooled(x, 2)
        self._roots = [weight.sqrt() for weight in weights]
        # weight of an error that is constant over a latent, at each scale
        parts = [_pooled(w.mean(1, keepdim=True), LATENT_STRIDE >> i) / 4**i for i, w in enumerate(weights)]
        self.local = PLAIN + torch.stack(parts).sum(0).permute(0, 2, 3, 1)

    def residuals(self, decoded: Tensor, rows: slice, columns: slice) -> list[Tensor]:
        """Weighted errors of a part of the images.

        Parameters
        ----------
        decoded : Tensor
            Decoded pixels of the part, (N,h,w,3).
        rows, columns : slice
            Position of the part. Both ends are multiples of 16, or the end of the image.

        Returns
        -------
        list of Tensor
            For each scale (N,h / 2^scale,w / 2^scale,3), rounded up. The first also has plain errors, as three
            more channels.
        """
        error = decoded - self.images[:, rows, columns]
        if not self._roots:
            return [error]
        out, plain, error = [], math.sqrt(PLAIN) * error, error.permute(0, 3, 1, 2)
        for scale, root in enumerate(self._roots):
            error = _pooled(error, 2) if scale else error
            part = root[:, :, _halved(rows, scale), _halved(columns, scale)]
            last = scale == len(self._roots) - 1  # at which MS-SSIM compares means, too
            out.append(((error if last else error - _blur(error)) * part).permute(0, 2, 3, 1))
        out[0] = torch.cat([out[0], plain], -1)
        return out


def total(residuals: Sequence[Tensor], part: tuple[slice, slice] | None = None) -> Tensor:
    """Sum of squares (N,) of residuals, or of a part of them, whose rows and columns may exceed the image."""
    sums = []
    for scale, values in enumerate(residuals):
        if part is not None:
            values = values[:, _halved(part[0], scale), _halved(part[1], scale)]
        sums.append(values.square().sum((1, 2, 3)))
    return torch.stack(sums).sum(0)


def _halved(pixels: slice, times: int) -> slice:
    return slice(pixels.start >> times, ceil_div(pixels.stop, 1 << times))


def _pooled(x: Tensor, edge: int) -> Tensor:
    """Means of blocks of edge x edge pixels; blocks at the lower and right border may be smaller."""
    return F.avg_pool2d(x, edge, ceil_mode=True, count_include_pad=False)


def _blur(x: Tensor) -> Tensor:
    """Gaussian means over the windows of MS-SSIM around each pixel; pixels at the border stand for those beyond."""
    channels, reach = x.shape[1], WINDOW // 2
    taps = torch.exp(-((torch.arange(WINDOW, dtype=x.dtype) - reach) ** 2) / (2 * SIGMA**2))
    taps = (taps / taps.sum()).to(x.device).expand(channels, 1, WINDOW)
    x = F.pad(x, (reach, reach, reach, reach), "replicate")
    x = F.conv2d(x, taps[:, :, None, :], groups=channels)
    return F.conv2d(x, taps[:, :, :, None], groups=channels)
