"""Bring float transforms into the ranges of their integer form without changing what they compute.

Between two linear layers, also across a ReLU, a channel can be scaled up in the first and down in the second. The
factors are chosen so that each channel fills the range of its fixed-point format on training images. The phase
`integer` trains on from there. Channels that bounded transforms clip keep their scale.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deepsic_codec.model.exact import fixed, formats
from deepsic_codec.model.networks import Analysis, Block, Modulate, SemanticHead, Synthesis

#: Share of a format's range that the largest values usually fill.
FILLED = 0.9
#: Upper bound of a factor; the lower bound is its inverse.
MAX_FACTOR = 64.0
#: Share of the images whose largest values are not clipped.
QUANTILE = 0.9
#: The same for the semantic head: clipping harms its scores more than coarse steps do.
HEAD_QUANTILE = 0.99


@dataclass
class Stage:
    """A residual stream: the layer that begins it, its blocks, and the layer that reads it.

    `rows` and `columns` count the outputs of the stem and the inputs of the reader that belong to one channel (4 where
    pixels are shuffled between them). `columns=-2`: the reader has all channels twice, one set after the other.
    `bounded`: streams and hidden channels are already clipped where integers are. `largest_values` holds the largest
    magnitude of each channel in each image, by layer.
    """

    stem: nn.Conv2d
    modulate: Modulate
    blocks: list[Block]
    reader: nn.Conv2d | nn.Linear
    rows: int = 1
    columns: int = 1
    bounded: bool = False
    largest_values: dict[str, list[Tensor]] = field(default_factory=dict)


def _stages(network: nn.Module) -> list[Stage]:
    """Return both streams of a transform, in order."""
    assert isinstance(network, Analysis | Synthesis)
    blocks8, blocks16, bounded = _blocks(network.blocks8), _blocks(network.blocks16), network.bounded
    if isinstance(network, Analysis):
        return [
            Stage(network.stem, network.mod8, blocks8, network.reduce, columns=4, bounded=bounded),
            Stage(network.reduce, network.mod16, blocks16, network.out, bounded=bounded),
        ]
    return [
        Stage(network.stem, network.mod16, blocks16, network.expand, bounded=bounded),
        Stage(network.expand, network.mod8, blocks8, network.out, rows=4, bounded=bounded),
    ]


def bias_of(layer: nn.Conv2d) -> Tensor:
    """Return the bias of a layer that has one."""
    assert layer.bias is not None
    return layer.bias


def _blocks(modules: nn.ModuleList) -> list[Block]:
    return [module for module in modules if isinstance(module, Block)]


@torch.no_grad()
def balance(transforms: Sequence[nn.Module], run: Callable[[], object], max_factor: float = MAX_FACTOR) -> None:
    """Rescale transforms in place.

    Parameters
    ----------
    transforms : sequence of Analysis or Synthesis
        Trained, in float form.
    run : callable
        Runs all of them on training images, in float form.
    max_factor : float
        Upper bound of the factors. With 1, channels only become smaller: for transforms that were balanced before.
    """
    stages = [stage for network in transforms for stage in _stages(network)]
    handles = [handle for stage in stages for handle in _watch(stage)]
    run()
    for handle in handles:
        handle.remove()
    for network in transforms:
        if isinstance(network, Synthesis):
            scale = network.input_scale / network.normaliser()
            network.stem.weight.mul_(scale[None, :, None, None])
            network.input_scale.copy_(network.normaliser())
    for stage in stages:
        _rescale(stage, max_factor)


@torch.no_grad()
def balance_head(head: SemanticHead, run: Callable[[], object]) -> None:
    """Rescale a semantic head in place; `run` runs it on cells, in float form.

    Logits keep their scale, because scores depend on it. The integer form clips them at +-8, where scores of 8 bits
    are 0 or 1 already.
    """
    stage = Stage(head.stem, head.mod, _blocks(head.blocks), head.hidden, columns=-2, bounded=head.bounded)
    hidden: list[Tensor] = []
    handles = [*_watch(stage), head.hidden.register_forward_hook(lambda module, x, out: hidden.append(out.float()))]
    run()
    for handle in handles:
        handle.remove()
    _rescale(stage, quantile=HEAD_QUANTILE)
    usual = torch.quantile(torch.cat(hidden)[:100_000].clamp(min=0), 0.999, dim=0).clamp(min=1e-6)
    min_factor = 1 if head.bounded else 1 / MAX_FACTOR
    factor = (FILLED * formats.HIDDEN_HIGH * 2.0**-formats.HIDDEN_BITS / usual).clamp(min_factor, MAX_FACTOR)
    head.hidden.weight.mul_(factor[:, None])
    head.hidden.bias.mul_(factor)
    head.out.weight.div_(factor)


def _watch(stage: Stage) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Register hooks that note the largest magnitude of each channel in each image."""

    def note(layer: nn.Module, name: str, group: int = 1, relu: bool = False) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, x: object, out: Tensor) -> None:
            largest = (out.clamp(min=0) if relu else out).float().abs().amax((2, 3))
            stage.largest_values.setdefault(name, []).append(largest.reshape(len(out), -1, group).amax(2))

        return layer.register_forward_hook(hook)

    yield note(stage.stem, "stem", stage.rows)
    yield note(stage.modulate, "stream")
    for number, block in enumerate(stage.blocks):
        yield note(block, "stream")
        yield note(block.spatial, f"spatial{number}")
        yield note(block.condition, f"up{number}", relu=True)


def _factor(stage: Stage, name: str, limit: float, max_factor: float, quantile: float) -> Tensor:
    """Return the factors (C,) that bring the channels of a layer to `limit`, the end of their range."""
    usual = torch.quantile(torch.cat(stage.largest_values[name]), quantile, dim=0)
    factor = (FILLED * limit / usual.clamp(min=1e-6)).clamp(1 / MAX_FACTOR, max_factor)
    if stage.bounded and (name == "stream" or name.startswith("up")):
        return factor.clamp(min=1)  # trained with clipping at this point: more room would change the results
    return factor


def _rescale(stage: Stage, max_factor: float = MAX_FACTOR, quantile: float = QUANTILE) -> None:
    stream = _factor(stage, "stream", formats.STREAM_MAX * 2.0**-formats.STREAM_BITS, max_factor, quantile)
    # half of the range: modulation may need the other half
    stem = _factor(stage, "stem", 0.5 * formats.STEM_MAX * 2.0**-formats.STREAM_BITS, max_factor, quantile)
    rows = stem.repeat_interleave(stage.rows)
    stage.stem.weight.mul_(rows[:, None, None, None])
    bias_of(stage.stem).mul_(rows)
    modulate = stage.modulate
    modulate.scale.table.copy_((1 + modulate.scale.table) * (stream / stem) - 1)
    modulate.offset.table.mul_(stream)
    for number, block in enumerate(stage.blocks):
        spatial = _factor(stage, f"spatial{number}", formats.READ_HIGH * 2.0**-formats.READ_BITS, max_factor, quantile)
        up = _factor(stage, f"up{number}", formats.HIDDEN_HIGH * 2.0**-formats.HIDDEN_BITS, max_factor, quantile)
        # a channel that is hardly used would grow with each balancing, until integers cannot hold its weights
        weight = block.spatial.weight * (spatial / stream)[:, None, None, None]
        spatial = spatial * fixed.room(weight, bias_of(block.spatial) * spatial, formats.SPATIAL).clamp(max=1)
        weight = block.up.weight * (up[:, None] / spatial[None])[:, :, None, None]
        biases = block.condition.biases(block.up.bias)
        up = up * fixed.room(weight, None if biases is None else biases * up, formats.UP).clamp(max=1)
        block.spatial.weight.mul_((spatial / stream)[:, None, None, None])
        bias_of(block.spatial).mul_(spatial)
        block.up.weight.mul_(up[:, None, None, None] / spatial[None, :, None, None])
        bias_of(block.up).mul_(up)
        if block.condition.offset is not None:
            block.condition.offset.table.mul_(up)
        block.down.weight.mul_(stream[:, None, None, None] / up[None, :, None, None])
        bias_of(block.down).mul_(stream)
    read = stream.repeat(2) if stage.columns == -2 else stream.repeat_interleave(stage.columns)
    stage.reader.weight.div_(read.reshape(1, -1, *[1] * (stage.reader.weight.ndim - 2)))
