"""What the refiner counts as distortion: sums of squares of weighted errors.

Either squared errors of pixels (`"mse"`), or (`"ms-ssim"`) squared errors at five scales,
each weighted by how little the image itself varies there, which is what MS-SSIM sees of an
error that is small (Wang, Simoncelli and Bovik 2003; its contrast term falls by s / (2 v + C)
for an error of variance s in a window of variance v).  Any such sum can be told apart by
window, and its curvature can be measured with random signs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepsic_codec.metrics import K2, SCALE_WEIGHTS
from deepsic_codec.payload.constants import LATENT_STRIDE

#: MS-SSIM: weights of plain squared errors, without which flat parts get nearly all the bits, and of those of scales.
PLAIN, SCALED = 0.2, 43.0
#: Edge of the windows that variances are taken in.
WINDOW = 9
#: The power of the variances by which errors are divided. One would be right for small errors; those of low rates are
#: so large in flat windows that MS-SSIM sees less of them than that.
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
        By how much errors weigh around each latent, (N,h,w,1); 1 for plain squared errors.
    """

    def __init__(self, images: Tensor, tune: str) -> None:
        self.images, self.tune = images, tune
        #: By scale, roots of weights, (N,3,H,W) and half as large from one to the next; none for plain errors.
        self._roots: list[Tensor] = []
        n, height, width, _ = images.shape
        self.local = images.new_ones(n, -(-height // LATENT_STRIDE), -(-width // LATENT_STRIDE), 1)
        if tune == "mse":
            return
        weights, x = [], images.permute(0, 3, 1, 2)
        for scale, share in enumerate(SCALE_WEIGHTS):
            variance = (_blur(x.square()) - _blur(x).square()).clamp(min=0)
            seen = _blur((2 * variance + (255 * K2) ** 2) ** -POWER)
            weights.append(SCALED * share * 4**scale * seen + (0 if scale else PLAIN))
            x = _pooled(x, 2)
        self._roots = [weight.sqrt() for weight in weights]
        # an error of a whole latent weighs that much at each scale
        parts = [_pooled(w.mean(1, keepdim=True), LATENT_STRIDE >> i) / 4**i for i, w in enumerate(weights)]
        self.local = torch.stack(parts).sum(0).permute(0, 2, 3, 1)

    def residuals(self, decoded: Tensor, rows: slice, columns: slice) -> list[Tensor]:
        """What is squared and summed up.

        Parameters
        ----------
        decoded : Tensor
            A part of the images as decoded, (N,h,w,3).
        rows, columns : slice
            Where it begins and ends; both are multiples of 16, or the image ends there.

        Returns
        -------
        list of Tensor
            By scale, (N,h / 2^scale,w / 2^scale,3), rounded up.
        """
        error = decoded - self.images[:, rows, columns]
        if not self._roots:
            return [error]
        out, error = [], error.permute(0, 3, 1, 2)
        for scale, root in enumerate(self._roots):
            error = _pooled(error, 2) if scale else error
            there = (_halved(part, scale) for part in (rows, columns))
            out.append((error * root[:, :, *there]).permute(0, 2, 3, 1))
        return out


def total(residuals: Sequence[Tensor], own: tuple[slice, slice] | None = None) -> Tensor:
    """Their sum of squares (N,), or that of a part, which begins and ends as above, or beyond the end."""
    found = []
    for scale, part in enumerate(residuals):
        if own is not None:
            part = part[:, _halved(own[0], scale), _halved(own[1], scale)]
        found.append(part.square().sum((1, 2, 3)))
    return torch.stack(found).sum(0)


def _halved(pixels: slice, times: int) -> slice:
    return slice(pixels.start >> times, -(-pixels.stop >> times))


def _pooled(x: Tensor, edge: int) -> Tensor:
    """Means of blocks of edge x edge, at the lower and right border of what there is of them."""
    return F.avg_pool2d(x, edge, ceil_mode=True, count_include_pad=False)


def _blur(x: Tensor) -> Tensor:
    """Means over windows, of what there is of them."""
    return F.avg_pool2d(x, WINDOW, 1, WINDOW // 2, count_include_pad=False)
