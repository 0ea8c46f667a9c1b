"""Numba loops give the integers of torch operations, at the ends of every range, on one thread and on several."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepsic_codec.model.exact import formats
from deepsic_codec.model.neighbours import Neighbours
from deepsic_codec.model.ops import numba as numba_module
from deepsic_codec.model.ops import select
from deepsic_codec.model.ops.numba import NumbaOps
from deepsic_codec.model.ops.protocol import Sums
from deepsic_codec.model.ops.torch import TorchOps
from deepsic_codec.model.schedule import CROSS, Step

FORMS = (TorchOps(), NumbaOps())

SIZES = [(1, 1, 1), (6, 3, 2), (40, 33, 40), (2048, 160, 4)]  # rows, columns, rows of biases


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(numba_module, "MIN_SHARED_VALUES", 64)
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
    stream = drawn(g, -formats.STREAM_MAX, formats.STREAM_MAX, rows, columns).float()

    def both(name, *arguments):
        """What either form makes of copies of the same, and leaves of the first of them."""
        results = []
        for form in FORMS:
            copies = [v.clone() if isinstance(v, torch.Tensor) else v for v in arguments]
            actual = getattr(form, name)(*copies)
            results.append(copies[0] if actual is None else actual)
        a, b = ([r] if isinstance(r, torch.Tensor) else r for r in results)
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y), name

    both("narrow", total, bias, shift, -128, 127)
    both("narrow", total, biases, shift, -5, 99)
    both("add", stream, total, bias, shift)
    both("read", stream, 4)
    both("read", stream / 32, 0)
    scale, offset = drawn(g, -2047, 2047, images, columns).float(), drawn(g, -(2**22), 2**22, images, columns).float()
    both("modulate", total, bias, shift, scale, offset)
    companded = torch.arange(32769).div(270, rounding_mode="floor").to(torch.int8)
    for kind in (torch.int16, torch.int32, torch.float32):
        both("features", drawn(g, -32767, 32767, rows, columns, dtype=kind), companded)
    sums, which = drawn(g, -(2**23), 2**23, rows, 2 * columns), drawn(g, -(2**22), 2**22, rows, 2 * columns)
    both("means_and_indices", sums, which[0].clone(), drawn(g, 1, 15, columns), drawn(g, 0, 10, columns))
    both("means_and_indices", sums, which, drawn(g, 1, 15, columns), drawn(g, 0, 10, columns))
    table = torch.arange(formats.WIDE_MAX + 1).div(3, rounding_mode="floor").to(torch.int32)
    both("companded_digits", drawn(g, -formats.WIDE_MAX, formats.WIDE_MAX, rows, columns), table)
    steps = drawn(g, 1, 2**22, images, columns)
    both("dequantise", drawn(g, -32768, 32767, rows, columns, dtype=torch.int16), steps)
    latents = drawn(g, -formats.WIDE_MAX, formats.WIDE_MAX, rows, columns)
    both("digits", latents)
    both("digits", latents, torch.exp2(drawn(g, -8, 8, columns).float()))


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 2)])
@pytest.mark.parametrize("q6", [True, False])
def test_pixels_of_both_forms_agree(threads, grid, q6):
    g = torch.Generator().manual_seed(1)
    n, h, w = grid
    parts = []
    for channels, count in ((768, n * h * w), (192, 4 * n * h * w)):
        parts.append(
            (drawn(g, -(2**28), 2**28, count, channels), drawn(g, -(2**22), 2**22, channels), drawn(g, 8, 31, channels))
        )
    actual = [form.pixels(*(Sums(*(t.clone() for t in p)) for p in parts), grid, q6) for form in FORMS]
    assert actual[0].shape == (n, 16 * h, 16 * w, 3) and actual[0].dtype == (torch.int16 if q6 else torch.uint8)
    assert torch.equal(*actual) and len(actual[0].unique()) > 20


def test_digits_are_what_they_are_called():
    values = torch.arange(-formats.WIDE_MAX, formats.WIDE_MAX + 1, dtype=torch.int32)[:, None]
    high, low = (d.to(torch.int32) for d in NumbaOps().digits(values))
    assert torch.equal(high * formats.DIGIT + low, values) and int(low.min()) >= -64 and int(low.max()) <= 63


def test_rows_are_done_once_also_while_the_interpreter_ends(monkeypatch):
    class Ended:
        def submit(self, *arguments):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    done = np.zeros(97, int)

    def kernel(first, last, values):
        done[first:last] += 1

    monkeypatch.setattr(numba_module, "MIN_SHARED_VALUES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    numba_module._over_rows(kernel, torch.zeros(97, 2))
    monkeypatch.setattr(numba_module, "_pool", lambda process: Ended())
    numba_module._over_rows(kernel, torch.zeros(97, 2))
    assert (done == 2).all()


@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_symbols_of_a_step_are_entered_where_they_belong(threads, kind):
    g = torch.Generator().manual_seed(5)
    step = Step(4, 9, "2", CROSS, 16)
    linear, magnitude = (drawn(g, -128, 127, 2, 9, 8, 16, dtype=torch.int8) for _ in range(2))
    before = Neighbours(linear, magnitude)
    rows = before.rows(step)[0]
    symbols = drawn(g, -32767, 32767, len(rows), 9, dtype=kind)
    companded = torch.arange(32769).div(270, rounding_mode="floor").to(torch.int8)
    actual = [Neighbours(linear, magnitude) for _ in FORMS]
    for form, neighbours in zip(FORMS, actual, strict=True):
        form.enter(neighbours, step, rows, symbols, companded)
    assert torch.equal(*(neighbours.both for neighbours in actual))
    changed = (actual[0].both != before.both).any(0)
    assert not changed[:, :4].any() and not changed[:, 13:].any()
    assert set(changed.any(1).nonzero()[:, 0].tolist()) <= set(rows.tolist()) and changed.any(1).sum() > 60


def test_torch_operations_are_what_the_formats_say():
    """A residual block and a step of the prior, written down in double precision."""
    chance = select._Chance(torch.device("cpu"))
    quality = chance.ints(1, 100, 2, dtype=torch.int64)
    block, area = chance.block(24, True), chance.ints(-2047, 2047, 2, 7, 9, 24).float()
    x = F.conv2d(area.permute(0, 3, 1, 2).double(), block.weight.double(), block.spatial_bias.double(), 1, 1, 1, 24)
    narrow = x.permute(0, 2, 3, 1).floor().clamp(formats.READ_LOW, formats.READ_HIGH)
    total = (narrow @ block.up.int8.double().t()).int() + block.up_bias[quality - 1][:, None, None]
    hidden = (total >> block.up_shift).clamp(*block.bounds).double()
    moved = ((hidden @ block.down.int8.double().t()).int() + block.down_bias) >> block.down_shift
    expected = (area + moved).clamp(-formats.STREAM_MAX, formats.STREAM_MAX)
    assert torch.equal(TorchOps().blocks(area.clone(), [block], quality), expected)
    for step in (Step(0, 8, "A", (), 32), Step(0, 8, "2", CROSS, 32), Step(8, 96, "1", (), 4)):
        near, tensors = chance.neighbours(104), chance.step(step)
        rows, _, image = near.rows(step)
        actual = TorchOps().predict(near, step, rows, tensors, quality[image])
        for one, other in zip(actual, predicted(near, step, rows, tensors, quality[image]), strict=True):
            assert torch.equal(one, other)


def predicted(near, step, rows, tensors, quality):
    total, (hidden, direct), row = tensors.out_bias[quality - 1].clone(), tensors[:2], quality - 1
    pitch = near.shape[2] + 2
    if hidden is not None:
        x = torch.stack([near.both[k, rows + dy * pitch + dx, c] for k, dy, dx, c in step.input_names()], 1).double()
        first = ((x @ hidden.first.int8.double().t()).int() + hidden.first_bias[row]) >> hidden.first_shift
        second = (first.clamp(-128, 127).double() @ hidden.second.int8.double().t()).int() + hidden.second_bias
        second = (second >> hidden.second_shift).clamp(-128, 127)
        total += (second.double() @ hidden.out.int8.double().t()).int()
    if direct is not None:
        for weight, (dy, dx) in zip(direct.weight, step.offsets, strict=True):
            signed = near.linear[rows + dy * pitch + dx, step.channels].int()
            total[:, : step.count] += (signed * weight) << direct.shift
    mean, index = total.chunk(2, 1)
    mean = (mean >> tensors.mean_shift).clamp(-32767, 32767).to(torch.int16)
    return mean, ((index >> tensors.index_shift) + 128).clamp(0, 252).to(torch.uint8)


def test_which_operations_a_device_gets(monkeypatch):
    monkeypatch.setattr(select, "_triton", lambda device: None)
    assert isinstance(select.ops_for("cpu"), NumbaOps)
    assert type(select.ops_for(torch.device("cuda", 0))) is type(select.ops_for("meta")) is TorchOps
