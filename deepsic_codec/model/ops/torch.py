"""Reference implementation in torch operations; runs on any device."""

import torch
from torch import Tensor

from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.matrix import depthwise_on
from deepsic_codec.model.exact.prior_formats import LINEAR_MAX
from deepsic_codec.model.logistic import INDEX_MAX, INDEX_MIDDLE, MEAN_LEVELS, MEAN_MAX, RATE_BITS
from deepsic_codec.model.neighbours import Neighbours
from deepsic_codec.model.ops.protocol import BlockTensors, RateTables, StepTensors, Sums, SymbolState
from deepsic_codec.model.schedule import Step

#: Range of hidden features of the prior, which are stored less 128.
HIDDEN_LOW, HIDDEN_HIGH = -128, 127


class TorchOps:
    """`protocol.Ops` in torch operations."""

    def narrow(self, total: Tensor, bias: Tensor, shift: Tensor, low: int, high: int) -> Tensor:
        return shifted(total, bias, shift).clamp_(low, high).to(torch.int8)

    def add(self, stream: Tensor, total: Tensor, bias: Tensor, shift: Tensor) -> None:
        stream.add_(shifted(total, bias, shift)).clamp_(-formats.STREAM_MAX, formats.STREAM_MAX)

    def read(self, values: Tensor, bits: int) -> Tensor:
        out = values.floor() if bits == 0 else values.mul(2.0**-bits).add_(0.5).floor_()
        return out.clamp_(formats.READ_LOW, formats.READ_HIGH).to(torch.int8)

    def modulate(self, total: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        values = shifted(total, bias, shift).clamp_(-formats.STEM_MAX, formats.STEM_MAX).float()
        values = values.view(len(scale), -1, total.shape[1])
        out = torch.addcmul(offset[:, None], values, scale[:, None]).mul_(2.0**-formats.MODULATION_BITS).floor_()
        return out.clamp_(-formats.STREAM_MAX, formats.STREAM_MAX).view(total.shape)

    def blocks(self, stream: Tensor, blocks: list[BlockTensors], quality: Tensor) -> Tensor:
        channels = stream.shape[3]
        rows, depthwise = stream.view(-1, channels), depthwise_on(stream.device)
        for block in blocks:
            bias = block.up_bias if block.up_bias.ndim == 1 else block.up_bias[quality - 1]
            spatial = self.read(depthwise(stream, block.weight, block.spatial_bias).reshape(-1, channels), 0)
            hidden = self.narrow(block.up.matmul(spatial), bias, block.up_shift, *block.bounds)
            self.add(rows, block.down.matmul(hidden), block.down_bias, block.down_shift)
        return stream

    def features(self, symbols: Tensor, companded: Tensor, halving: int) -> tuple[Tensor, Tensor]:
        numbers = (symbols.to(torch.int32) + (symbols > 0)) >> 1 if halving else symbols
        return numbers.clamp(-LINEAR_MAX, LINEAR_MAX).to(torch.int8), companded[symbols.abs().long()]

    def enter(self, neighbours: Neighbours, step: Step, rows: Tensor, symbols: Tensor, companded: Tensor) -> None:
        linear, magnitude = self.features(symbols, companded, neighbours.halving)
        neighbours.linear[rows, step.channels], neighbours.magnitude[rows, step.channels] = linear, magnitude

    def predict(
        self, neighbours: Neighbours, step: Step, rows: Tensor, tensors: StepTensors, quality: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        x, row = neighbours.gather(step, rows), quality - 1
        if x is None or tensors.hidden is None:
            total = torch.zeros(len(rows), 2 * step.count, dtype=torch.int32, device=rows.device)
        else:
            part, bounds = tensors.hidden, (HIDDEN_LOW, HIDDEN_HIGH)
            h = self.narrow(part.first.matmul(x), part.first_bias[row], part.first_shift, *bounds)
            h = self.narrow(part.second.matmul(h), part.second_bias, part.second_shift, *bounds)
            total = part.out.matmul(h)
            if tensors.direct is not None:
                signed = x[:, step.direct_inputs].view(len(rows), len(step.offsets), step.count)
                added = (signed.to(torch.int32) * tensors.direct.weight).sum(1, dtype=torch.int32)
                total[:, : step.count] += added << tensors.direct.shift
        return self.means_and_indices(total, tensors.out_bias[row], tensors.mean_shift, tensors.index_shift)

    def means_and_indices(
        self, total: Tensor, bias: Tensor, mean_shift: Tensor, index_shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums int32 (P,2C) of a prior -> means int16 and scale indices uint8, (P,C).

        `(sum + bias) >> shift`, means clipped to +-MEAN_MAX, indices to 0..INDEX_MAX around their middle. Biases are
        (2C,) or (P,2C). `total` may be changed.
        """
        mean, index = total.add_(bias).chunk(2, 1)
        mean = (mean >> mean_shift).clamp_(-MEAN_MAX, MEAN_MAX)
        index = ((index >> index_shift) + INDEX_MIDDLE).clamp_(0, INDEX_MAX)
        return mean.to(torch.int16), index.to(torch.uint8)

    def move_symbols(
        self,
        state: SymbolState,
        step: Step,
        rows: tuple[Tensor, Tensor],
        predicted: tuple[Tensor, Tensor],
        tables: RateTables,
        companded: Tensor,
        quality: Tensor | int,
    ) -> None:
        padded, flat = rows
        means, indices = predicted
        latents, symbols = state.latents[flat, step.channels], state.symbols[flat, step.channels]
        away = symbols * MEAN_LEVELS - means
        error = torch.floor((symbols.float() - latents) * 2**RATE_BITS + 0.5).to(torch.int32)
        towards = -torch.sign(away)
        saved = tables.saved[indices.long(), away.abs().clamp(max=tables.saved.shape[1] - 1)]
        price = tables.price[quality - 1][..., step.channels]
        cost = (price * ((1 << RATE_BITS) + 2 * towards * error)) >> RATE_BITS
        moves = (saved > cost) & (away.abs() > MEAN_LEVELS // 2)
        symbols = (symbols + torch.where(moves, towards, 0)).to(torch.int32)
        # nothing makes a GPU wait for the host
        state.symbols[:, step.channels] = state.symbols[:, step.channels].index_copy(0, flat, symbols)
        self.enter(state.neighbours, step, padded, symbols, companded)

    def dequantise(self, symbols: Tensor, steps: Tensor) -> Tensor:
        step = steps[:, None]
        # beyond this limit every product ends in the same clamp
        limit = (1 << (14 + formats.STEP_BITS)) // step + 1
        values = symbols.to(torch.int32).view(len(steps), -1, symbols.shape[1])
        product = torch.minimum(torch.maximum(values, -limit), limit) * step
        latents = (product + (1 << formats.STEP_BITS - 1)) >> formats.STEP_BITS
        return latents.clamp_(-formats.WIDE_MAX, formats.WIDE_MAX).view(symbols.shape)

    def digits(self, values: Tensor, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if unit is not None:
            values = values.float().mul_(unit).add_(0.5).floor_().clamp_(-formats.WIDE_MAX, formats.WIDE_MAX)
            values = values.to(torch.int32)
        high = (values + formats.DIGIT // 2) >> 7
        return high.to(torch.int8), (values - (high << 7)).to(torch.int8)

    def companded_digits(self, values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return self.digits(table[values.abs().long()] * values.sign())

    def pixels(self, linear: Sums, rest: Sums, grid: tuple[int, int, int]) -> Tensor:
        n, h, w = grid
        branches = []
        for sums, edge, k in ((linear, 16, 1), (rest, 8, 2)):
            part = shifted(sums.total, sums.bias, sums.shift).clamp_(-formats.PIXEL_MAX, formats.PIXEL_MAX)
            branches.append(scatter(part.to(torch.int16).view(n, k * h, k * w, -1), edge))
        half = 128 << formats.PIXEL_BITS
        return branches[0].add_(branches[1]).clamp_(-half, (255 << formats.PIXEL_BITS) - half).add_(half)


def rows_per_entry(total: Tensor, entries: Tensor) -> int:
    """Number of rows (P,C) that share an entry of (B,C); all rows share entries (C,)."""
    return len(total) // len(entries) if entries.ndim > 1 else max(1, len(total))


def scatter(x: Tensor, edge: int) -> Tensor:
    """Pixel-shuffle, channels last: (N,h,w,edge edge C) -> (N,h edge,w edge,C)."""
    n, h, w, c = x.shape
    c //= edge * edge
    return x.view(n, h, w, edge, edge * c).permute(0, 1, 3, 2, 4).reshape(n, h * edge, w * edge, c)


def shifted(total: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """`(sum + bias) >> shift` of sums (P,C), in place; biases are (C,), or (B,C) with P / B rows for each."""
    if bias.ndim > 1 and len(bias) != len(total):
        total.view(len(bias), -1, total.shape[1]).add_(bias[:, None])
    else:
        total.add_(bias)
    return total.bitwise_right_shift_(shift)
