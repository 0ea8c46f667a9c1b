"""Choice of the operations for a device, after a check of its kernels.

CUDA gets Triton kernels if Triton is installed. Other devices get torch operations, and so does a device on which a
kernel fails or returns one different integer.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from deepsic_codec import config
from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.matrix import Matrix
from deepsic_codec.model.neighbours import Neighbours
from deepsic_codec.model.ops.protocol import (
    BlockTensors,
    Direct,
    Hidden,
    Ops,
    RateTables,
    StepTensors,
    Sums,
    SymbolState,
)
from deepsic_codec.model.ops.torch import TorchOps
from deepsic_codec.model.schedule import CROSS, Step

log = logging.getLogger(__name__)
TORCH = TorchOps()


def ops_for(device: torch.device | str) -> Ops:
    """The fastest operations of a device."""
    device = torch.device(device)
    if device.type != "cuda" or config.get().kernels == "plain":
        return TORCH
    return _triton(device) or TORCH


@lru_cache(maxsize=8)
def _triton(device: torch.device) -> Ops | None:
    try:
        ops: Ops = importlib.import_module("deepsic_codec.model.ops.triton").TritonOps()
        with torch.inference_mode():
            wrong = [name for name, same in checks(ops, device) if not same()]
    except Exception as error:  # a compiler, a driver: whatever fails, torch operations work
        if not isinstance(error, ImportError):
            log.warning(
                "the kernels for %s failed (%s: %s); torch operations are used instead",
                device,
                type(error).__name__,
                error,
            )
        return None
    if wrong:
        log.warning(
            "the kernels for %s give different integers (%s); torch operations are used instead",
            device,
            ", ".join(wrong),
        )
        return None
    return ops


class _Chance:
    """Random tensors on a device, the same in every process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers low..high."""
        return torch.randint(low, high + 1, shape, generator=self.generator).to(self.device, dtype)

    def block(self, c: int, conditioned: bool) -> BlockTensors:
        """Tensors of a residual block of c channels."""
        hidden, qualities = 2 * c, (formats.QUALITIES,) if conditioned else ()
        weight = self.ints(-20, 20, c, 1, 3, 3).float() / 64
        return BlockTensors(
            weight,
            weight.flatten(1).t().contiguous(),
            self.ints(-20, 20, c).float() / 8,
            Matrix(self.ints(-127, 127, hidden, c), self.device),
            self.ints(-9999, 9999, *qualities, hidden),
            self.ints(6, 10, hidden),
            Matrix(self.ints(-127, 127, c, hidden), self.device),
            self.ints(-9999, 9999, c),
            self.ints(4, 9, c),
            (-128, 127),
        )

    def step(self, step: Step, width: int = 128) -> StepTensors:
        """Tensors of a step of the prior."""
        hidden = direct = None
        if step.input_count:
            hidden = Hidden(
                Matrix(self.ints(-127, 127, width, step.input_count), self.device),
                self.ints(-9999, 9999, formats.QUALITIES, width),
                self.ints(6, 10, width),
                Matrix(self.ints(-127, 127, width, width), self.device),
                self.ints(-9999, 9999, width),
                self.ints(6, 10, width),
                Matrix(self.ints(-127, 127, 2 * step.count, width), self.device),
            )
        if step.signed:
            direct = Direct(self.ints(-99, 99, len(step.offsets), step.count), self.ints(0, 6, step.count))
        bias = self.ints(-9999, 9999, formats.QUALITIES, 2 * step.count)
        return StepTensors(hidden, direct, bias, self.ints(3, 8, step.count), self.ints(6, 9, step.count))

    def neighbours(self, latents: int, halving: int = 0) -> Neighbours:
        """Features of symbols (2,5,7,latents)."""
        linear, magnitude = (self.ints(-127, 127, 2, 5, 7, latents, dtype=torch.int8) for _ in range(2))
        return Neighbours(linear, magnitude, halving)


def checks(ops: Any, device: torch.device) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Names of operations, each with a function that compares it with torch operations on random integers."""
    chance = _Chance(device)
    ints = chance.ints
    rows, n, images = 3 * 35, 24, 3
    total, bias, shift = ints(-(2**23), 2**23, rows, n), ints(-(2**22), 2**22, n), ints(0, 20, n)
    biases = ints(-(2**22), 2**22, images, n)
    stream = ints(-2047, 2047, rows, n).float()
    symbols = ints(-32767, 32767, rows, n, dtype=torch.int16)
    companded = ints(0, 127, 32769, dtype=torch.int8)
    scale, offset = ints(-2047, 2047, images, n).float(), ints(-(2**22), 2**22, images, n).float()
    wide = ints(-formats.WIDE_MAX, formats.WIDE_MAX, rows, n)
    unit = torch.exp2(ints(-6, 2, n).float())
    steps = ints(1, 2**22, images, n)
    linear = Sums(ints(-(2**23), 2**23, 12, 768), ints(-(2**22), 2**22, 768), ints(4, 16, 768))
    rest = Sums(ints(-(2**23), 2**23, 48, 192), ints(-(2**22), 2**22, 192), ints(4, 16, 192))
    quality = ints(1, 100, 2, dtype=torch.int64)

    def alike(name: str, *arguments: Any) -> Callable[[], bool]:
        """Compare results, and the first argument, which may be changed in place."""

        def same() -> bool:
            pairs = []
            for form in (ops, TORCH):
                copies = [_copied(argument) for argument in arguments]
                result = getattr(form, name)(*copies)
                pairs.append(copies[0] if result is None else result)
            return _equal(*pairs)

        return same

    def moved(by_quality: bool) -> bool:
        step, latents = (
            Step(3, n, "2", CROSS, 9),
            torch.rand(70, n + 5, generator=chance.generator).to(device) * 40 - 20,
        )
        near = chance.neighbours(n + 5)
        padded, flat, _ = near.rows(step)
        row_quality = ints(1, 100, len(flat), dtype=torch.int64) if by_quality else 33
        predicted = ints(-200, 200, len(flat), n, dtype=torch.int16), ints(0, 252, len(flat), n, dtype=torch.uint8)
        tables = RateTables(ints(-(2**11), 2**13, 253, 256), ints(0, 2**13, 100, n + 5))
        states = [SymbolState(latents, torch.round(latents).int(), _copied(near)) for _ in range(2)]
        for form, state in zip((ops, TORCH), states, strict=True):
            form.move_symbols(state, step, (padded, flat), predicted, tables, companded, row_quality)
        changed = bool((states[0].symbols != torch.round(latents)).any())
        return changed and _equal(states[0].symbols, states[1].symbols) and _equal(*(s.neighbours for s in states))

    entered = Step(2, n, "2", CROSS, 9)
    for name, halving in (("enter", 0), ("enter with a trellis", 1)):
        near = chance.neighbours(n + 5, halving)
        padded = near.rows(entered)[0]
        yield name, alike("enter", near, entered, padded, symbols[: len(padded)], companded)
    yield "move_symbols", lambda: moved(False)
    yield "move_symbols by quality", lambda: moved(True)
    yield "narrow", alike("narrow", total, bias, shift, -128, 127)
    yield "narrow by image", alike("narrow", total, biases, shift, -128, 127)
    yield "add", alike("add", stream, total, bias, shift)
    yield "read", alike("read", stream, 4)
    yield "read rounded down", alike("read", stream / 8, 0)
    yield "modulate", alike("modulate", total, bias, shift, scale, offset)
    yield "features", alike("features", symbols, companded, 0)
    yield "features with a trellis", alike("features", symbols, companded, 1)
    yield "means_and_indices", alike("means_and_indices", total, bias, shift[: n // 2], shift[n // 2 :])
    yield "dequantise", alike("dequantise", symbols, steps)
    yield "digits", alike("digits", wide)
    yield "digits normalised", alike("digits", wide, unit)
    yield "pixels", alike("pixels", linear, rest, (2, 2, 3))
    for c, conditioned in ((24, True), (128, True), (256, False)):
        area = ints(-2047, 2047, 2, 7, 9, c).float()
        yield f"block of {c}", alike("blocks", area, [chance.block(c, conditioned)], quality)
    for step in (Step(0, 8, "A", (), 32), Step(0, 8, "2", CROSS, 32), Step(8, 96, "1", (), 4)):
        near = chance.neighbours(104)
        padded, _, image = near.rows(step)
        row_quality = quality[image] if step.signed else 77
        tensors = chance.step(step)
        yield f"step of {step.count}, {step.input_count}", alike("predict", near, step, padded, tensors, row_quality)


def _copied(argument: Any) -> Any:
    """A copy of an argument that operations may change in place."""
    if isinstance(argument, Sums):
        return Sums(*(t.clone() for t in argument))
    if isinstance(argument, Neighbours):
        shape = (2, *(k + 2 if i in (1, 2) else k for i, k in enumerate(argument.shape)))
        magnitude, linear = (t[:, 1:-1, 1:-1] for t in argument.both.view(shape))
        return Neighbours(linear, magnitude, argument.halving)
    return argument.clone() if isinstance(argument, Tensor) else argument


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Neighbours):
        return _equal(one.both, other.both)
    if isinstance(one, tuple):
        return all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return one.dtype == other.dtype and bool((one == other).all())
