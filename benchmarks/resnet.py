"""ResNet-18 (He et al. 2015, table 1): what a classifier that sees the pixels reaches on the same tiles."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a short path."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        path = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.path = nn.Identity() if same else path

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> (B,width,h/stride,w/stride)."""
        h = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(h)) + self.path(x))


class ResNet18(nn.Module):
    """The published network; ``small`` drops the first subsampling by 4, as is usual for tiles of 64 pixels or less."""

    def __init__(self, classes: int, small: bool = False) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False) if small else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(64), nn.ReLU(), pool]
        for inputs, width, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
            layers += [Block(inputs, width, stride), Block(width, width, 1)]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B,3,h,w) in 0..255 -> (B,classes) logits."""
        return self.out(self.body((x - 128) / 64).mean((2, 3)))
