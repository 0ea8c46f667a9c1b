"""Products and depth-wise convolutions of integers that give the same result everywhere.

There are three implementations, of which the first that is exact on the device is used: 8-bit matrix instructions,
float32 with sums below 2^24, and float64. A process can switch float32 products to a lower precision at any time
(TF32, bfloat16), so exactness is tested before each use.
"""

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
        #: For 8-bit instructions; on CUDA rows of zeros are added up to a multiple of 8.
        self._padded = self.int8
        if self.int8.device.type == "cuda" and len(values) % 8:
            self._padded = F.pad(self.int8, (0, 0, 0, -len(values) % 8))

    def matmul(self, rows: Tensor) -> Tensor:
        """int8 (P,K) -> int32 (P,N); sums must stay below 2^24."""
        device = self.int8.device
        if self._fits(len(rows)) and _has_int8(device.type):
            result = torch._int_mm(rows, self._padded.t())
            return result if self._padded is self.int8 else result[:, : len(self.int8)].contiguous()
        if self._float32 is None:
            self._float32 = self.int8.float()
        with torch.autocast(device.type, enabled=False):  # a caller's autocast would round the sums
            if _float32_is_exact(device):
                return (rows.float() @ self._float32.t()).to(torch.int32)
            return (rows.double() @ self._float32.double().t()).to(torch.int32)

    def _fits(self, rows: int) -> bool:
        """Whether 8-bit instructions support the sizes: on CUDA multiples of 8, and more than 16 rows."""
        return self.int8.device.type == "cpu" or (self.int8.shape[1] % 8 == 0 and rows > 16)


@lru_cache(maxsize=8)
def _has_int8(kind: str) -> bool:
    """Whether 8-bit products are fast and exact here: without VNNI some CPU libraries saturate."""
    if kind not in ("cpu", "cuda"):
        return False
    if kind == "cpu" and not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([-128, -127, 127, 126], dtype=torch.int8)
    rows, matrix = (extremes[torch.randint(0, 4, (64, 256), generator=generator)] for _ in range(2))
    rows[0], matrix[0], rows[1], matrix[1] = -128, 127, 127, 127
    try:
        result = torch._int_mm(rows.to(kind), matrix.to(kind).t()).cpu()
    except (RuntimeError, AttributeError):
        return False
    return bool((result.double() == rows.double() @ matrix.double().t()).all())


@lru_cache(maxsize=8)
def _probe(device: torch.device) -> tuple[Tensor, Tensor, int]:
    # odd numbers as large as the format allows: rounding anywhere would show
    rows = (torch.arange(256, device=device) % 28 * 2 + 201.0).expand(64, 256)
    return rows, torch.full((256, 64), 127.0, device=device), int((rows[0].double() * 127).sum())


def _float32_is_exact(device: torch.device) -> bool:
    """Whether float32 products are exact now: a process can be set to multiply with less precision (TF32)."""
    rows, matrix, expected = _probe(device)
    return bool((rows @ matrix == expected).all())


def depthwise_on(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the 3x3 convolution of each channel of (N,h,w,C), with zeros around it, for a device.

    Streams have at most 12 bits, weights (C,1,3,3) and biases (C,) at most 8 bits, as integers in float32 times a power
    of two, with sums below 2^20. Exactness is probed at every call: call once for a list of layers, and do not keep it.
    """
    convolve: Callable[..., Tensor]
    if device.type == "cuda" and _has_torch_kernel(device):
        convolve = _torch_kernel
    else:
        convolve = _single if _convolution_is_exact(device) else _double

    def depthwise(stream: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return convolve(stream.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)

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
    expected = F.conv2d(x.double(), weight.double(), padding=1, groups=32).float()
    x, weight, expected = (t.to(device, memory_format=torch.channels_last) for t in (x, weight, expected))
    return x, weight, expected


def _torch_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own depth-wise kernel for CUDA; float32 regardless of the process's settings, unlike cuDNN's."""
    result: Tensor = torch.ops.aten._conv_depthwise2d.default(x, weight, [3, 3], bias, [1, 1], [1, 1], [1, 1])
    return result


@lru_cache(maxsize=8)
def _has_torch_kernel(device: torch.device) -> bool:
    """Whether PyTorch's kernel exists and is exact; cached, as the probe makes the device wait for the host."""
    x, weight, expected = _spatial_probe(device)
    try:
        return bool((_torch_kernel(x, weight, None) == expected).all())
    except (RuntimeError, AttributeError):  # absent in this version of torch or on this device
        return False


def _convolution_is_exact(device: torch.device) -> bool:
    x, weight, expected = _spatial_probe(device)
    return bool((_single(x, weight, None) == expected).all())
