"""Compiled loops give the integers that tensors give, at the ends of every range, on one thread and on several."""

import numpy as np
import pytest
import torch

from deepsic_codec.model.exact import fixed
from deepsic_codec.model.ops import select as passes
from deepsic_codec.model.ops import tensor_ops as epilogue
from deepsic_codec.model.ops.tensor_ops import Compiled, Sums, Tensors

SIZES = [(1, 1, 1), (6, 3, 2), (40, 33, 40), (2048, 160, 4)]  # rows, columns, rows of biases


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(epilogue, "SHARED", 64)
    yield request.param
    torch.set_num_threads(before)


def drawn(generator, low, high, *shape, dtype=torch.int32):
    """Integers of a range, many of them its ends."""
    values = torch.randint(low, high + 1, shape, generator=generator)
    ends = torch.rand(shape, generator=generator)
    return values.masked_fill(ends < 0.1, low).masked_fill(ends > 0.9, high).to(dtype)


@pytest.mark.parametrize("rows,columns,images", SIZES)
def test_both_forms_agree(threads, rows, columns, images):
    g = torch.Generator().manual_seed(rows)
    total, bias = drawn(g, -(2**23), 2**23, rows, columns), drawn(g, -(2**22), 2**22, columns)
    biases, shift = drawn(g, -(2**22), 2**22, images, columns), drawn(g, 0, 24, columns)
    stream = drawn(g, -fixed.STREAM_MAX, fixed.STREAM_MAX, rows, columns).float()

    def both(name, *given):
        """What either form makes of copies of the same, and leaves of the first of them."""
        results = []
        for form in (Tensors, Compiled):
            copies = [v.clone() if isinstance(v, torch.Tensor) else v for v in given]
            found = getattr(form, name)(*copies)
            results.append(copies[0] if found is None else found)
        a, b = ([r] if isinstance(r, torch.Tensor) else r for r in results)
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y), name

    both("narrow", total, bias, shift, -128, 127)
    both("narrow", total, biases, shift, -5, 99)
    both("add", stream, total, bias, shift)
    both("read", stream, 4)
    both("read", stream / 32, 0)
    scale, offset = drawn(g, -2047, 2047, images, columns).float(), drawn(g, -(2**22), 2**22, images, columns).float()
    both("modulate", total, bias, shift, 4095, scale, offset)
    companded = torch.arange(32769).div(270, rounding_mode="floor").to(torch.int8)
    for kind in (torch.int16, torch.int32, torch.float32):
        both("contexts", drawn(g, -32767, 32767, rows, columns, dtype=kind), companded, 127)
    sums, which = drawn(g, -(2**23), 2**23, rows, 2 * columns), drawn(g, -(2**22), 2**22, rows, 2 * columns)
    both("expected", sums, which[0].clone(), drawn(g, 1, 15, columns), drawn(g, 0, 10, columns), 32767, 252)
    both("expected", sums, which, drawn(g, 1, 15, columns), drawn(g, 0, 10, columns), 32767, 252)
    table = torch.arange(fixed.WIDE_MAX + 1).div(3, rounding_mode="floor").to(torch.int32)
    both("companded", drawn(g, -fixed.WIDE_MAX, fixed.WIDE_MAX, rows, columns), table)
    steps = drawn(g, 1, 2**22, images, columns)
    both("dequantise", drawn(g, -32768, 32767, rows, columns, dtype=torch.int16), steps)
    latents = drawn(g, -fixed.WIDE_MAX, fixed.WIDE_MAX, rows, columns)
    both("digits", latents)
    both("digits", latents, torch.exp2(drawn(g, -8, 8, columns).float()))


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 2)])
@pytest.mark.parametrize("fine", [True, False])
def test_pixels_of_both_forms_agree(threads, grid, fine):
    g = torch.Generator().manual_seed(1)
    n, h, w = grid
    parts = []
    for channels, count in ((768, n * h * w), (192, 4 * n * h * w)):
        parts.append(
            (drawn(g, -(2**28), 2**28, count, channels), drawn(g, -(2**22), 2**22, channels), drawn(g, 8, 31, channels))
        )
    found = [form.pixels(*(Sums(*(t.clone() for t in p)) for p in parts), grid, fine) for form in (Tensors, Compiled)]
    assert found[0].shape == (n, 16 * h, 16 * w, 3) and found[0].dtype == (torch.int16 if fine else torch.uint8)
    assert torch.equal(*found) and len(found[0].unique()) > 20


def test_digits_are_what_they_are_called():
    values = torch.arange(-fixed.WIDE_MAX, fixed.WIDE_MAX + 1, dtype=torch.int32)[:, None]
    high, low = (d.to(torch.int32) for d in Compiled.digits(values))
    assert torch.equal(high * fixed.DIGIT + low, values) and int(low.min()) >= -64 and int(low.max()) <= 63


def test_rows_are_done_once_also_while_the_interpreter_ends(monkeypatch):
    class Ended:
        def submit(self, *given):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    done = np.zeros(97, int)

    def kernel(first, last, values):
        done[first:last] += 1

    monkeypatch.setattr(epilogue, "SHARED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    epilogue._shared(kernel, torch.zeros(97, 2))
    monkeypatch.setattr(epilogue, "_pool", lambda process: Ended())
    epilogue._shared(kernel, torch.zeros(97, 2))
    assert (done == 2).all()


@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_symbols_of_a_pass_are_entered_where_they_belong(threads, kind):
    g = torch.Generator().manual_seed(5)
    symbols, places = drawn(g, -32767, 32767, 70, 9, dtype=kind), torch.randperm(300, generator=g)[:70]
    companded = torch.arange(32769).div(270, rounding_mode="floor").to(torch.int8)
    before = drawn(g, -128, 127, 2, 300, 16, dtype=torch.int8)
    found = [before.clone() for _ in range(2)]
    for form, (linear, magnitude) in zip((Tensors, Compiled), found, strict=True):
        form.enter(symbols, companded, linear, magnitude, places, 4, 127)
    assert torch.equal(*found)
    changed = (found[0] != before).any(0)
    assert not changed[:, :4].any() and not changed[:, 13:].any() and changed.any(1).sum() == 70


def test_other_devices_get_tensors(monkeypatch):
    monkeypatch.setattr(passes, "_fused", lambda device: None)
    assert passes.passes_on("cpu") is Compiled and passes.passes_on(torch.device("cuda", 0)) is Tensors
