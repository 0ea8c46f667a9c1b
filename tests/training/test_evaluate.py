"""Figures of a model from real payloads, and the cost of its networks."""

import numpy as np

from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.metrics import ms_ssim, psnr
from deepsic_codec.samples import drone_frame
from deepsic_codec.training.evaluate import complexity, evaluate, means
from deepsic_codec.training.run import ARCHITECTURES


def test_figures_are_those_of_the_codec():
    image = drone_frame()[:192, :256]
    (result,) = evaluate([("a.png", image)], "base", 40.0)
    codec = DeepSIC(quality=40.0, transform="features")
    payload = codec.encode(image)
    decoded = codec.decode(payload)
    assert result.nbytes == len(payload) and result.bpp == 8 * len(payload) / (192 * 256)
    error = np.abs(image.astype(float) - decoded)
    assert result.rmse == np.sqrt(np.square(error).mean()) and result.largest == error.max()
    assert result.psnr == psnr(image, decoded) and result.ms_ssim == ms_ssim(image, decoded)
    small = means(list(evaluate([("b.png", image[:64, :64]), ("a.png", image)], "base", 40.0)))
    assert len(small) == 1 and small[0].ms_ssim == result.ms_ssim, "an image too small for MS-SSIM is left out of it"


def test_the_architecture_stays_within_the_budget():
    """20 kMAC/px for decoding, 1 for the semantic head, with the second digits of integers."""
    cost = complexity(ARCHITECTURES["base"])
    assert cost["decoding"] == cost["prior"] + cost["synthesis"]
    assert 8 < cost["decoding"] <= 20 and cost["head"] <= 1
