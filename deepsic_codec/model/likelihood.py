"""Likelihood of symbols under logistic distributions, in floating point: for estimates of rates."""

import torch
from torch import Tensor

from deepsic_codec.model.logistic import SCALES, scale_table


def log_scales(device: torch.device | str = "cpu") -> Tensor:
    """`scale_table` as float32 on a device."""
    return torch.tensor(scale_table(), dtype=torch.float32, device=device)


def scale_of(index: Tensor, table: Tensor) -> Tensor:
    """Scale of real-valued indices, which are clipped to [0, SCALES - 1]; `table` holds the logarithms (SCALES,)."""
    index = index.clamp(0, SCALES - 1)
    low = index.detach().floor().clamp(0, SCALES - 2)
    base = table[low.long()]
    return torch.exp(base + (table[low.long() + 1] - base) * (index - low))


def logistic_bits(distance: Tensor, scale: Tensor) -> Tensor:
    """-log2 of the mass in a unit bin whose centre lies at a distance >= 0 from the mean."""
    # differences of sigmoids on the small side keep their precision
    mass = torch.sigmoid((0.5 - distance) / scale) - torch.sigmoid((-0.5 - distance) / scale)
    return -torch.log2(mass.clamp(min=1e-9))
