"""Distortion that refinement lowers: sums of squares of weighted errors.

With `"mse"` all errors weigh the same. With `"ms-ssim"` errors count at five scales, and weigh less where the image
varies more. This approximates how MS-SSIM falls with small errors (Wang, Simoncelli and Bovik 2003: its contrast term
falls by s / (2 v + C) for an error of variance s in a window of variance v). A sum of squares can be split by window,
and its curvature can be measured with random signs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepsic_codec.axes import ceil_div
from deepsic_codec.metrics import K2, SCALE_WEIGHTS
from deepsic_codec.payload.constants import LATENT_STRIDE

#: MS-SSIM: weights of plain squared errors, without which flat parts get nearly all the bits, and of weighted errors.
PLAIN, SCALED = 0.2, 43.0
#: Edge of the windows in which variances are computed.
WINDOW = 9
#: Power of the variances by which errors are divided. One would be right for small errors; at low rates, errors in flat
#: windows are so large that they change MS-SSIM less.
POWER = 0.5


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
            weight = _blur((2 * variance + (255 * K2) ** 2) ** -POWER)
            weights.append(SCALED * share * 4**scale * weight + (0 if scale else PLAIN))
            x = _pooled(x, 2)
        self._roots = [weight.sqrt() for weight in weights]
        # weight of an error that is constant over a latent, at each scale
        parts = [_pooled(w.mean(1, keepdim=True), LATENT_STRIDE >> i) / 4**i for i, w in enumerate(weights)]
        self.local = torch.stack(parts).sum(0).permute(0, 2, 3, 1)

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
            For each scale (N,h / 2^scale,w / 2^scale,3), rounded up.
        """
        error = decoded - self.images[:, rows, columns]
        if not self._roots:
            return [error]
        out, error = [], error.permute(0, 3, 1, 2)
        for scale, root in enumerate(self._roots):
            error = _pooled(error, 2) if scale else error
            part = root[:, :, _halved(rows, scale), _halved(columns, scale)]
            out.append((error * part).permute(0, 2, 3, 1))
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
    """Means over windows around each pixel, without pixels beyond the border."""
    return F.avg_pool2d(x, WINDOW, 1, WINDOW // 2, count_include_pad=False)
