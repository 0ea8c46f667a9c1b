"""Operations on integers in torch: what the formats say."""

import pytest
import torch
import torch.nn.functional as F

from deepsic_codec.model.exact import formats
from deepsic_codec.model.neighbours import Neighbours
from deepsic_codec.model.ops import select
from deepsic_codec.model.ops.torch import TorchOps
from deepsic_codec.model.schedule import CROSS, Step


def drawn(generator, low, high, *shape, dtype=torch.int32):
    """Integers of a range, many of them its ends."""
    values = torch.randint(low, high + 1, shape, generator=generator)
    ends = torch.rand(shape, generator=generator)
    return values.masked_fill(ends < 0.1, low).masked_fill(ends > 0.9, high).to(dtype)


def test_digits_are_what_they_are_called():
    values = torch.arange(-formats.WIDE_MAX, formats.WIDE_MAX + 1, dtype=torch.int32)[:, None]
    high, low = (d.to(torch.int32) for d in TorchOps().digits(values))
    assert torch.equal(high * formats.DIGIT + low, values) and int(low.min()) >= -64 and int(low.max()) <= 63


@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_symbols_of_a_step_are_entered_where_they_belong(kind):
    g = torch.Generator().manual_seed(5)
    step = Step(4, 9, "2", CROSS, 16)
    linear, magnitude = (drawn(g, -128, 127, 2, 9, 8, 16, dtype=torch.int8) for _ in range(2))
    before = Neighbours(linear, magnitude)
    rows = before.rows(step)[0]
    symbols = drawn(g, -32767, 32767, len(rows), 9, dtype=kind)
    companded = torch.arange(32769).div(270, rounding_mode="floor").to(torch.int8)
    after = Neighbours(linear, magnitude)
    TorchOps().enter(after, step, rows, symbols, companded)
    changed = (after.both != before.both).any(0)
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
    assert all(type(select.ops_for(device)) is TorchOps for device in ("cpu", "cuda:0", "meta"))
