"""Products and depth-wise convolutions of integers that come out the same everywhere.

Three ways, chosen by what the device does right: 8-bit matrix instructions, float32 whose
sums stay below 2^24, and float64.  All give the same integers.  A process can be set to
multiply float32 in less (TF32, bfloat16) at any time, so that is tried out before each use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


class Matrix:
    """An integer matrix (N,K) of at most 8 bits, to be multiplied with rows of 8-bit integers."""

    def __init__(self, values: Tensor, device: torch.device | str) -> None:
        self.int8 = values.to(device=device, dtype=torch.int8).contiguous()
        self._float32: Tensor | None = None
        #: As 8-bit instructions take it: on CUDA with as many more rows of zeros as make a multiple of 8.
        self._whole = self.int8
        if self.int8.device.type == "cuda" and len(values) % 8:
            self._whole = F.pad(self.int8, (0, 0, 0, -len(values) % 8))

    def matmul(self, rows: Tensor) -> Tensor:
        """int8 (P,K) -> int32 (P,N); sums are to stay below 2^24."""
        device = self.int8.device
        if self._fits(len(rows)) and _has_int8(device.type):
            found = torch._int_mm(rows, self._whole.t())
            return found if self._whole is self.int8 else found[:, : len(self.int8)].contiguous()
        if self._float32 is None:
            self._float32 = self.int8.float()
        with torch.autocast(device.type, enabled=False):  # a caller's autocast would round the sums
            if _float32_is_exact(device):
                return (rows.float() @ self._float32.t()).to(torch.int32)
            return (rows.double() @ self._float32.double().t()).to(torch.int32)

    def _fits(self, rows: int) -> bool:
        """Whether 8-bit instructions take such sizes: on CUDA multiples of 8, and more than 16 rows."""
        return self.int8.device.type == "cpu" or (self.int8.shape[1] % 8 == 0 and rows > 16)


@lru_cache(maxsize=8)
def _has_int8(kind: str) -> bool:
    """Whether 8-bit products are fast and right here: without VNNI some CPU libraries saturate."""
    if kind not in ("cpu", "cuda"):
        return False
    if kind == "cpu" and not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([-128, -127, 127, 126], dtype=torch.int8)
    rows, matrix = (extremes[torch.randint(0, 4, (64, 256), generator=generator)] for _ in range(2))
    rows[0], matrix[0], rows[1], matrix[1] = -128, 127, 127, 127
    try:
        found = torch._int_mm(rows.to(kind), matrix.to(kind).t()).cpu()
    except (RuntimeError, AttributeError):
        return False
    return bool((found.double() == rows.double() @ matrix.double().t()).all())


@lru_cache(maxsize=8)
def _probe(device: torch.device) -> tuple[Tensor, Tensor, int]:
    # odd numbers as large as the format allows: rounding anywhere would show
    rows = (torch.arange(256, device=device) % 28 * 2 + 201.0).expand(64, 256)
    return rows, torch.full((256, 64), 127.0, device=device), int((rows[0].double() * 127).sum())


def _float32_is_exact(device: torch.device) -> bool:
    """Whether float32 products are exact just now: a process can be set to multiply in less (TF32)."""
    rows, matrix, wanted = _probe(device)
    return bool((rows @ matrix == wanted).all())


def depthwise_on(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What convolves each channel of (N,h,w,C) by 3x3 there, with zeros around it; the same shape.

    Streams, weights (C,1,3,3) and biases (C,) are integers of at most 12 and 8 bits in float32, or such times
    a power of two, with sums below 2^20.  Tried out at every call: ask once for a stream of layers, and keep nothing.
    """
    way: Callable[..., Tensor]
    if device.type == "cuda" and _has_plain_kernel(device):
        way = _plain
    else:
        way = _single if _convolution_is_exact(device) else _double

    def depthwise(stream: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return way(stream.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)

    return depthwise


def _single(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


def _double(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=x.shape[1]).float()


@lru_cache(maxsize=8)
def _spatial_probe(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randint(0, 1024, (1, 32, 8, 8), generator=generator) * 2 + 1.0) - 1024
    weight = torch.randint(0, 57, (32, 1, 3, 3), generator=generator) * 2.0 - 57
    wanted = F.conv2d(x.double(), weight.double(), padding=1, groups=32).float()
    x, weight, wanted = (t.to(device, memory_format=torch.channels_last) for t in (x, weight, wanted))
    return x, weight, wanted


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own depth-wise kernel for CUDA: float32 whatever the process is set to, unlike cuDNN's."""
    found: Tensor = torch.ops.aten._conv_depthwise2d.default(x, weight, [3, 3], bias, [1, 1], [1, 1], [1, 1])
    return found


@lru_cache(maxsize=8)
def _has_plain_kernel(device: torch.device) -> bool:
    """Whether it is there and right; asked once, as asking makes the device wait for the host."""
    x, weight, wanted = _spatial_probe(device)
    try:
        return bool((_plain(x, weight, None) == wanted).all())
    except (RuntimeError, AttributeError):  # not in this version of torch, or not for this device
        return False


def _convolution_is_exact(device: torch.device) -> bool:
    x, weight, wanted = _spatial_probe(device)
    return bool((_single(x, weight, None) == wanted).all())
