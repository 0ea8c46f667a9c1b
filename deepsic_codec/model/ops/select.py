"""Which form of :mod:`deepsic_codec.model.ops.tensor_ops` a device gets, and whether its kernels can be relied on.

A CPU has compiled loops, CUDA has Triton's kernels where Triton is installed, and any other device, or one
on which a kernel fails or gives as much as one other integer, has tensor operations.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepsic_codec import config
from deepsic_codec.model.exact import fixed
from deepsic_codec.model.ops.tensor_ops import Compiled, Contexts, PassTensors, Residual, Sums, Tensors

log = logging.getLogger(__name__)


def passes_on(device: torch.device | str) -> type[Tensors] | type[Compiled]:
    """What is fastest there."""
    device = torch.device(device)
    if device.type == "cpu":
        return Compiled
    return fused_on(device) or Tensors


def fused_on(device: torch.device | str) -> Any:
    """Triton's kernels (``kernels.Fused``) for a device, or None."""
    device = torch.device(device)
    if device.type != "cuda" or config.get().kernels == "plain":
        return None
    return _fused(device)


@lru_cache(maxsize=8)
def _fused(device: torch.device) -> Any:
    try:
        fused = importlib.import_module("deepsic_codec.model.ops.triton").Fused
        with torch.inference_mode():
            wrong = [name for name, same in checks(fused, device) if not same()]
    except Exception as error:  # a compiler, a driver: whatever fails there, there is another way
        if not isinstance(error, ImportError):
            log.warning("kernels for %s: %s: %s; using slower operations", device, type(error).__name__, error)
        return None
    if wrong:
        log.warning("kernels for %s give other integers (%s); using slower operations", device, ", ".join(wrong))
        return None
    return fused


def checks(fused: Any, device: torch.device) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Names of kernels, and what compares each with tensor operations on random integers."""
    chance = torch.Generator().manual_seed(0)

    def ints(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=chance).to(device, dtype)

    rows, n, images = 3 * 35, 24, 3
    total, bias, shift = ints(-(2**23), 2**23, rows, n), ints(-(2**22), 2**22, n), ints(0, 20, n)
    own = ints(-(2**22), 2**22, images, n)
    stream = ints(-2047, 2047, rows, n).float()
    symbols = ints(-32767, 32767, rows, n, dtype=torch.int16)
    companded = ints(0, 127, 32769, dtype=torch.int8)
    scale, offset = ints(-2047, 2047, images, n).float(), ints(-(2**22), 2**22, images, n).float()
    wide = ints(-fixed.WIDE_MAX, fixed.WIDE_MAX, rows, n)
    unit = torch.exp2(ints(-6, 2, n).float())
    steps = ints(1, 2**22, images, n)
    grid = 2, 2, 3
    linear = Sums(ints(-(2**23), 2**23, 12, 768), ints(-(2**22), 2**22, 768), ints(4, 16, 768))
    rest = Sums(ints(-(2**23), 2**23, 48, 192), ints(-(2**22), 2**22, 192), ints(4, 16, 192))

    def alike(name: str, *given: Any) -> Callable[[], bool]:
        def same() -> bool:
            found, wanted = (getattr(kind, name)(*_copied(given)) for kind in (fused, Tensors))
            return _equal(found, wanted)

        return same

    def against(name: str, wanted: Callable[..., Any], *given: Any) -> Callable[[], bool]:
        return lambda: _equal(getattr(fused, name)(*given), wanted(*given))

    def added() -> bool:
        found, wanted = stream.clone(), stream.clone()
        fused.add(found, total.clone(), bias, shift)
        Tensors.add(wanted, total.clone(), bias, shift)
        return _equal(found, wanted)

    def entered() -> bool:
        places = torch.randperm(2 * rows, generator=chance)[:rows].to(device)
        features = [[ints(-9, 9, 2 * rows, n + 5, dtype=torch.int8) for _ in range(2)]]
        features.append([t.clone() for t in features[0]])
        for kind, (seen, other) in zip((fused, Tensors), features, strict=True):
            kind.enter(symbols, companded, seen, other, places, 2, 127)
        return _equal(tuple(features[0]), tuple(features[1]))

    def moved(quality: Tensor | int) -> bool:
        exact = torch.rand(2 * rows, n + 5, generator=chance).to(device) * 40 - 20
        chosen = [torch.round(exact).int() for _ in range(2)]
        predicted = ints(-200, 200, rows, n, dtype=torch.int16), ints(0, 252, rows, n, dtype=torch.uint8)
        places = torch.randperm(2 * rows, generator=chance)[:rows].to(device)
        tables = ints(-(2**11), 2**13, 253, 256), ints(0, 2**13, 100, n + 5)
        found = [
            kind.move(own, exact, predicted, places, 3, *tables, quality, 8, 8)
            for kind, own in zip((fused, Tensors), chosen, strict=True)
        ]
        return _equal(*found) and _equal(*chosen) and bool((chosen[0] != exact.round()).any())

    yield "enter", entered
    yield "move", lambda: moved(33)
    yield "move by quality", lambda: moved(ints(1, 100, rows, dtype=torch.int64))
    yield "narrow", alike("narrow", total, bias, shift, -128, 127)
    yield "narrow by image", alike("narrow", total, own, shift, -128, 127)
    yield "add", added
    yield "read", alike("read", stream, 4)
    yield "read as it is", alike("read", stream / 8, 0)
    yield "modulate", alike("modulate", total, bias, shift, 4095, scale, offset)
    yield "contexts", alike("contexts", symbols, companded, 127)
    yield "expected", alike("expected", total, bias, shift[: n // 2], shift[n // 2 :], 32767, 252)
    yield "dequantise", alike("dequantise", symbols, steps)
    yield "digits", alike("digits", wide)
    yield "digits normalised", alike("digits", wide, unit)
    yield "pixels", alike("pixels", linear, rest, grid, False)
    yield "fine pixels", alike("pixels", linear, rest, grid, True)
    for c, conditioned in ((24, True), (128, True), (256, False)):
        block = _random_block(ints, c, conditioned)
        area = ints(-2047, 2047, 2, 7, 9, c).float()
        image = ints(0, 99, 2, dtype=torch.int64) if conditioned else None
        yield f"block of {c}", against("block", block_of, area, block, image)
    for count, k, others in ((8, 0, 0), (8, 70, 4), (96, 130, 0)):
        yield f"pass of {count}, {k}", against("predict", pass_of, *_random_pass(ints, count, k, others))


def block_of(stream: Tensor, part: Residual, image: Tensor | None) -> Tensor:
    """What :meth:`Fused.block` computes, in double precision."""
    c = stream.shape[3]
    weight = part.taps.t().reshape(c, 1, 3, 3).double()
    x = F.conv2d(stream.permute(0, 3, 1, 2).double(), weight, part.spatial_bias.double(), padding=1, groups=c)
    narrow = x.permute(0, 2, 3, 1).floor().clamp(fixed.READ_LOW, fixed.READ_HIGH)
    bias = part.up_bias if image is None else part.up_bias[image][:, None, None]
    hidden = ((narrow @ part.up.double().t()).int() + bias) >> part.up_shift
    hidden = hidden.clamp(*part.bounds).double()
    moved = ((hidden @ part.down.double().t()).int() + part.down_bias) >> part.down_shift
    return (stream + moved).clamp(-fixed.STREAM_MAX, fixed.STREAM_MAX)


def pass_of(
    seen: Tensor,
    rows: Tensor,
    own: tuple[int, int],
    at: Contexts,
    part: PassTensors,
    quality: Tensor | int,
    mean_max: int,
    index_max: int,
) -> tuple[Tensor, Tensor]:
    """What :meth:`Fused.predict` computes, in double precision."""
    (start, count), latents = own, seen.shape[2]
    flat, plane = seen.reshape(-1), seen.shape[1] * latents
    which = (quality if isinstance(quality, Tensor) else torch.full_like(rows, quality)) - 1
    total = part.out_bias[which].clone()
    hidden: Any = part  # with these layers, or without all of them
    if part.first is not None:
        x = flat[(at.kinds.long() * plane + at.offsets) + (rows * latents)[:, None]].double()
        first = ((x @ hidden.first.double().t()).int() + hidden.first_bias[which]) >> hidden.first_shift
        first = first.clamp(-128, 127).double()
        second = ((first @ hidden.second.double().t()).int() + hidden.second_bias) >> hidden.second_shift
        total += (second.clamp(-128, 127).double() @ hidden.out.double().t()).int()
    if part.direct is not None and part.direct_shift is not None:
        channel = torch.arange(count, device=rows.device)
        near = flat[plane + (rows * latents)[:, None, None] + at.around[:, None] + (start + channel)]
        total[:, :count] += (near.int() * part.direct).sum(1, dtype=torch.int32) << part.direct_shift
    return Tensors.expected(total, torch.zeros_like(total[0]), part.mean_shift, part.index_shift, mean_max, index_max)


def _random_block(ints: Callable[..., Tensor], c: int, conditioned: bool) -> Residual:
    hidden, rows = 2 * c, (100,) if conditioned else ()
    return Residual(
        ints(-20, 20, 9, c).float() / 64,
        ints(-20, 20, c).float() / 8,
        ints(-127, 127, hidden, c, dtype=torch.int8),
        ints(-9999, 9999, *rows, hidden),
        ints(6, 10, hidden),
        ints(-127, 127, c, hidden, dtype=torch.int8),
        ints(-9999, 9999, c),
        ints(4, 9, c),
        (-128, 127),
    )


def _random_pass(ints: Callable[..., Tensor], count: int, k: int, others: int) -> tuple[Any, ...]:
    width, latents, plane = 128, 104, 90
    seen = ints(-127, 127, 2, plane, latents, dtype=torch.int8)
    rows = ints(20, 60, 75, dtype=torch.int64)
    places = ints(-20 * latents, 21 * latents, k, dtype=torch.int64)
    at = Contexts(ints(0, 1, k), places, ints(-20, 20, others, dtype=torch.int64) * latents)
    weights = [ints(-127, 127, n, m, dtype=torch.int8) for n, m in ((width, k), (width, width), (2 * count, width))]
    out = [ints(-9999, 9999, 100, 2 * count), ints(3, 8, count), ints(6, 9, count)]
    direct: list[Any] = [ints(-99, 99, others, count), ints(0, 6, count)] if others else [None, None]
    hidden: list[Tensor | None] = [None] * 7
    if not k:
        return seen, rows, (8, count), at, PassTensors(*hidden, *out, *direct), 40, 32767, 252  # type: ignore[arg-type]
    hidden = [
        weights[0],
        ints(-9999, 9999, 100, width),
        ints(6, 10, width),
        weights[1],
        ints(-9999, 9999, width),
        ints(6, 10, width),
        weights[2],
    ]
    quality = ints(1, 100, 75, dtype=torch.int64) if others else 77
    return seen, rows, (8, count), at, PassTensors(*hidden, *out, *direct), quality, 32767, 252  # type: ignore[arg-type]


def _copied(given: tuple[Any, ...]) -> list[Any]:
    """Tensor operations work in place."""
    return [
        Sums(*(t.clone() for t in v)) if isinstance(v, Sums) else v.clone() if isinstance(v, Tensor) else v
        for v in given
    ]


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(found, tuple):
        return all(_equal(a, b) for a, b in zip(found, wanted, strict=True))
    return found.dtype == wanted.dtype and bool((found == wanted).all())
