"""Distortion of the refiner: parts add up to the whole, and `"ms-ssim"` orders errors as MS-SSIM does."""

import numpy as np
import pytest
import torch

from deepsic_codec.metrics import ms_ssim
from deepsic_codec.model.distortion import Distortion, total
from deepsic_codec.samples import drone_frame


def image(height, width):
    return torch.from_numpy(drone_frame()[600 : 600 + height, 700 : 700 + width].copy())[None].float()


def noise(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, shape)).float()


@pytest.mark.parametrize("tune", ["mse", "ms-ssim"])
@pytest.mark.parametrize("height,width", [(157, 161), (16, 16), (1, 33), (80, 96)])
def test_parts_add_up(tune, height, width):
    original = image(height, width)
    decoded = original + noise(original.shape)
    distortion = Distortion(original, tune)
    whole = total(distortion.residuals(decoded, slice(0, height), slice(0, width)))
    parts, edge = torch.zeros(1), 48
    for y in range(0, height, edge):
        for x in range(0, width, edge):
            # a window of which 16 pixels on each side belong to its neighbours
            rows, columns = (slice(max(0, at - 16), min(end, at + edge + 16)) for at, end in ((y, height), (x, width)))
            seen = distortion.residuals(decoded[:, rows, columns], rows, columns)
            core = slice(y - rows.start, y - rows.start + edge), slice(x - columns.start, x - columns.start + edge)
            parts += total(seen, core)
    # at the coarse scales, windows of MS-SSIM are wider than what is shared
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5 if tune == "mse" else 1e-4)
    assert distortion.local.shape == (1, -(-height // 16), -(-width // 16), 1) and (distortion.local > 0).all()


def test_plain_errors_are_squares():
    original = image(32, 48)
    decoded = original + noise(original.shape)
    actual = total(Distortion(original, "mse").residuals(decoded, slice(0, 32), slice(0, 48)))
    assert actual.item() == pytest.approx((decoded - original).square().sum().item(), rel=1e-5)


def test_tells_what_ms_ssim_sees():
    """Errors of one size count less if they are grainy or in busy places, as in MS-SSIM."""
    original = image(256, 256)
    distortion = Distortion(original, "ms-ssim")
    smooth = torch.nn.functional.avg_pool2d(noise((1, 3, 256 + 8, 256 + 8)), 9, 1).permute(0, 2, 3, 1)
    grain = noise(original.shape)
    variance = original.mean(3, keepdim=True)
    variance = (variance - variance.mean((1, 2), keepdim=True)).abs()
    busy = grain * (variance > variance.median())
    errors = [e * (3 / e.square().mean().sqrt()) for e in (smooth, grain, busy)]
    counted = [total(distortion.residuals(original + e, slice(0, 256), slice(0, 256))).item() for e in errors]
    pixels = original[0].numpy()
    seen = [1 - ms_ssim(pixels, pixels + e[0].numpy()) for e in errors]
    assert np.argsort(counted).tolist() == np.argsort(seen).tolist()
    assert counted[0] > 1.5 * counted[1]


def test_images_of_a_batch_do_not_see_each_other():
    both = torch.cat([image(64, 64), noise((1, 64, 64, 3)) * 20 + 128])
    decoded = both + noise(both.shape, 1)
    together = total(Distortion(both, "ms-ssim").residuals(decoded, slice(0, 64), slice(0, 64)))
    for i in range(2):
        alone = Distortion(both[i : i + 1], "ms-ssim").residuals(decoded[i : i + 1], slice(0, 64), slice(0, 64))
        assert total(alone).item() == pytest.approx(together[i].item(), rel=1e-5)
