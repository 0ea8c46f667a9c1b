"""Products of integer matrices that come out the same everywhere.

Three ways, chosen by what the device does right: 8-bit matrix instructions, float32 whose
sums stay below 2^24, and float64.  All give the same integers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


class Matrix:
    """An integer matrix (N,K) of at most 8 bits, to be multiplied with rows of 8-bit integers."""

    def __init__(self, values: Tensor, device: torch.device | str) -> None:
        self.int8 = values.to(device=device, dtype=torch.int8).contiguous()
        self._float32: Tensor | None = None

    def of(self, rows: Tensor) -> Tensor:
        """int8 (P,K) -> int32 (P,N); sums are to stay below 2^24."""
        device = self.int8.device
        if _has_int8(device.type):
            return torch._int_mm(rows, self.int8.t())
        if self._float32 is None:
            self._float32 = self.int8.float()
        with torch.autocast(device.type, enabled=False):  # a caller's autocast would round the sums
            if _float32_is_exact(device):
                return (rows.float() @ self._float32.t()).to(torch.int32)
            return (rows.double() @ self._float32.double().t()).to(torch.int32)


@lru_cache(maxsize=8)
def _has_int8(kind: str) -> bool:
    """Whether 8-bit products are fast and right here: without VNNI some libraries saturate."""
    if kind != "cpu" or not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([-128, -127, 127, 126], dtype=torch.int8)
    rows, matrix = (extremes[torch.randint(0, 4, (64, 256), generator=generator)] for _ in range(2))
    rows[0], matrix[0], rows[1], matrix[1] = -128, 127, 127, 127
    try:
        found = torch._int_mm(rows, matrix.t())
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
