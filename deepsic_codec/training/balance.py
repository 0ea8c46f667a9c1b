"""Bring float transforms into the ranges of their integer form without changing what they compute.

Between two linear layers any channel may be scaled up in the first and down in the second
(also across a ReLU).  These factors are chosen so that, on training images, every channel
fills the range that its fixed-point format has; quantisation-aware training starts there.
Channels that bounded transforms clip keep their scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from deepsic_codec.model.exact import fixed
from deepsic_codec.model.networks import Analysis, Block, Modulate, SemanticHead, Synthesis

#: Share of a format's range that the largest values usually take, and bounds of a factor.
FILLED, LARGEST = 0.9, 64.0
#: Of the largest values of images: beyond it they are clipped.
QUANTILE = 0.9
#: The same for the semantic head, whose scores suffer more from what is clipped than from what is coarse.
HEAD_QUANTILE = 0.99


@dataclass
class Stage:
    """A residual stream: what begins it, its blocks, and what reads it.

    ``rows`` and ``columns`` are how many of the stem's outputs and of the reader's inputs
    belong to one channel (4 where pixels are shuffled between); -2 means that all channels
    are read once and then a second time.
    """

    stem: nn.Conv2d
    modulate: Modulate
    blocks: list[Block]
    reader: nn.Conv2d | nn.Linear
    rows: int = 1
    columns: int = 1
    bounded: bool = False  # whether streams and hidden channels are clipped already where integers are
    seen: dict[str, list[Tensor]] = field(default_factory=dict)


def stages(network: Analysis | Synthesis) -> list[Stage]:
    """Both streams of a transform, in order."""
    blocks8, blocks16 = list(network.blocks8), list(network.blocks16)
    if isinstance(network, Analysis):
        return [
            Stage(network.stem, network.mod8, blocks8, network.reduce, columns=4),
            Stage(network.reduce, network.mod16, blocks16, network.out),
        ]
    return [
        Stage(network.stem, network.mod16, blocks16, network.expand),
        Stage(network.expand, network.mod8, blocks8, network.out, rows=4),
    ]


@torch.no_grad()
def balance(transforms: Sequence[Analysis | Synthesis], run: Callable[[], None], largest: float = LARGEST) -> None:
    """Rescale transforms in place.

    Parameters
    ----------
    transforms : sequence of Analysis or Synthesis
        Trained, in float form.
    run : callable
        Runs all of them on some training images, in float form.
    largest : float
        Bound of the factors; 1 for what was balanced before: it makes room where there is none.
    """
    found = [replace(stage, bounded=network.bounded) for network in transforms for stage in stages(network)]
    handles = [handle for stage in found for handle in _watch(stage)]
    run()
    for handle in handles:
        handle.remove()
    for network in transforms:
        if isinstance(network, Synthesis):
            scale = network.input_scale / network.normaliser()
            network.stem.weight.mul_(scale[None, :, None, None])
            network.input_scale.copy_(network.normaliser())
    for stage in found:
        _rescale(stage, largest)


@torch.no_grad()
def balance_head(head: SemanticHead, run: Callable[[], None]) -> None:
    """Rescale a semantic head in place; ``run`` runs it on some cells, in float form.

    Logits stay what they are, as scores are what they mean: beyond +-8 they are clipped, where
    scores of 8 bits are 0 and 1 all the same.
    """
    stage = Stage(head.stem, head.mod, list(head.blocks), head.hidden, columns=-2, bounded=head.bounded)
    seen: list[Tensor] = []
    handles = [*_watch(stage), head.hidden.register_forward_hook(lambda m, given, out: seen.append(out.float()))]
    run()
    for handle in handles:
        handle.remove()
    _rescale(stage, quantile=HEAD_QUANTILE)
    usual = torch.quantile(torch.cat(seen)[:100_000].clamp(min=0), 0.999, dim=0).clamp(min=1e-6)
    least = 1 if head.bounded else 1 / LARGEST
    factor = (FILLED * fixed.HIDDEN_HIGH * 2.0**-fixed.HIDDEN_BITS / usual).clamp(least, LARGEST)
    head.hidden.weight.mul_(factor[:, None])
    head.hidden.bias.mul_(factor)
    head.out.weight.div_(factor)


def _watch(stage: Stage) -> Iterable[torch.utils.hooks.RemovableHandle]:
    """Hooks that note the largest magnitude of each channel in each image."""

    def note(name: str, group: int = 1) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, given: object, out: Tensor) -> None:
            largest = out.float().abs().amax((2, 3))
            stage.seen.setdefault(name, []).append(largest.reshape(len(out), -1, group).amax(2))

        return hook

    yield stage.stem.register_forward_hook(note("stem", stage.rows))
    yield stage.modulate.register_forward_hook(note("stream"))
    for number, block in enumerate(stage.blocks):
        yield block.register_forward_hook(note("stream"))
        yield block.spatial.register_forward_hook(note(f"spatial{number}"))
        yield block.condition.register_forward_hook(_relu(note(f"up{number}")))


def _relu(hook: Callable[[nn.Module, object, Tensor], None]) -> Callable[[nn.Module, object, Tensor], None]:
    return lambda module, given, out: hook(module, given, out.clamp(min=0))


def _factor(stage: Stage, name: str, range_: float, largest: float, quantile: float = QUANTILE) -> Tensor:
    usual = torch.quantile(torch.cat(stage.seen[name]), quantile, dim=0)
    factor = (FILLED * range_ / usual.clamp(min=1e-6)).clamp(1 / LARGEST, largest)
    if stage.bounded and (name == "stream" or name.startswith("up")):
        return factor.clamp(min=1)  # it was trained with what is clipped there: room would change what it computes
    return factor


def _rescale(stage: Stage, largest: float = LARGEST, quantile: float = QUANTILE) -> None:
    stream = _factor(stage, "stream", fixed.STREAM_MAX * 2.0**-fixed.STREAM_BITS, largest, quantile)
    # half of its range: modulation may need the other half
    stem = _factor(stage, "stem", 0.5 * fixed.STEM_MAX * 2.0**-fixed.STREAM_BITS, largest, quantile)
    rows = stem.repeat_interleave(stage.rows)
    stage.stem.weight.mul_(rows[:, None, None, None])
    stage.stem.bias.mul_(rows)
    modulate = stage.modulate
    modulate.scale.table.copy_((1 + modulate.scale.table) * (stream / stem) - 1)
    modulate.offset.table.mul_(stream)
    for number, block in enumerate(stage.blocks):
        spatial = _factor(stage, f"spatial{number}", fixed.READ_HIGH * 2.0**-fixed.READ_BITS, largest, quantile)
        up = _factor(stage, f"up{number}", fixed.HIDDEN_HIGH * 2.0**-fixed.HIDDEN_BITS, largest, quantile)
        # a channel that is hardly used would grow each time that it is brought here, until no integer holds its weights
        weight = block.spatial.weight * (spatial / stream)[:, None, None, None]
        spatial = spatial * fixed.room(weight, block.spatial.bias * spatial, fixed.SPATIAL).clamp(max=1)
        weight = block.up.weight * (up[:, None] / spatial[None])[:, :, None, None]
        up = up * fixed.room(weight, block.condition.biases(block.up.bias) * up, fixed.UP).clamp(max=1)
        block.spatial.weight.mul_((spatial / stream)[:, None, None, None])
        block.spatial.bias.mul_(spatial)
        block.up.weight.mul_(up[:, None, None, None] / spatial[None, :, None, None])
        block.up.bias.mul_(up)
        if block.condition.offset is not None:
            block.condition.offset.table.mul_(up)
        block.down.weight.mul_(stream[:, None, None, None] / up[None, :, None, None])
        block.down.bias.mul_(stream)
    read = stream.repeat(2) if stage.columns == -2 else stream.repeat_interleave(stage.columns)
    stage.reader.weight.div_(read.reshape(1, -1, *[1] * (stage.reader.weight.ndim - 2)))
