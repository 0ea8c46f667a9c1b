"""Features of symbols around the positions of each step of the coding order."""

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from deepsic_codec.model.device import synchronize
from deepsic_codec.model.schedule import LINEAR, MAGNITUDE, Offsets, Step

if TYPE_CHECKING:
    from deepsic_codec.model.family import CodingPrior

#: Of every step that has positions: means in eighths int16 and scale indices in quarters uint8, (P,count).
Predictions = list[tuple[Tensor, Tensor]]


class ContextOffsets(NamedTuple):
    """Positions of the features of a step in `Neighbours.both`, flattened, relative to the first channel of a row.

    `kinds` int32 (K,) has the kind of each feature, `offsets` int64 (K,) its offset within the features of this kind,
    and `direct` int64 (n,) the offsets of the neighbours that predict the mean directly, without their channels.
    """

    kinds: Tensor
    offsets: Tensor
    direct: Tensor


class Neighbours:
    """Features of the symbols (N,h,w,C) of a batch, with a border of zeros.

    Attributes
    ----------
    shape : tuple of int
        N, h, w, C.
    both : Tensor
        Magnitudes and clipped symbols, (2, N (h+2) (w+2), C).
    magnitude, linear : Tensor
        Its two halves, which share its memory.
    halving : int
        1 with a trellis, whose symbols are in halves of a step; 0 without.
    """

    def __init__(self, linear: Tensor, magnitude: Tensor, halving: int = 0) -> None:
        n, h, w, c = linear.shape
        self.shape = n, h, w, c
        self.halving = halving
        both = linear.new_zeros(2, n, h + 2, w + 2, c)
        for kind, values in ((MAGNITUDE, magnitude), (LINEAR, linear)):
            both[kind, :, 1:-1, 1:-1] = values
        self.both = both.view(2, -1, c)
        self.magnitude, self.linear = self.both[MAGNITUDE], self.both[LINEAR]

    def rows(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Rows in padded and in unpadded symbols, and image numbers, of a step's positions; int64 (P,) each."""
        return _rows(step, *self.shape[:3], self.both.device, torch.is_inference_mode_enabled())

    def gather(self, step: Step, rows: Tensor) -> Tensor | None:
        """Features (P,K) of a step at padded rows (P,), in the order of `Step.inputs`; None if it has none."""
        pitch, parts = self.shape[2] + 2, []
        for inputs in step.inputs:
            at = rows[:, None] + _row_offsets(inputs.offsets, pitch, rows.device)
            source = self.both[inputs.kind, :, inputs.first : inputs.stop]
            parts.append(source.index_select(0, at.view(-1)).view(len(rows), -1))
        return torch.cat(parts, 1) if parts else None

    def context_offsets(self, step: Step) -> ContextOffsets:
        """Where `gather` finds the features of a step."""
        return _context_offsets(step, self.shape[2] + 2, self.shape[3], self.both.device)


def iter_steps(prior: "CodingPrior", neighbours: Neighbours) -> Iterator[tuple[int, Step, Tensor, Tensor, Tensor]]:
    """Number, step, padded rows, unpadded rows and image numbers of every step that has positions."""
    for number, step in enumerate(prior.steps):
        rows, flat, image = neighbours.rows(step)
        if len(rows):
            yield number, step, rows, flat, image


@lru_cache(maxsize=64)
def _row_offsets(offsets: Offsets, pitch: int, device: torch.device) -> Tensor:
    """Distances from a padded row to the rows at the offsets."""
    with torch.inference_mode(False):
        distances = torch.tensor([dy * pitch + dx for dy, dx in offsets]).to(device)
    synchronize(device)
    return distances


# Cached: making these anew would stop a GPU 18 times in a training step. `inference` keeps tensors that were made in
# inference mode, which autograd refuses, apart from others.
@lru_cache(maxsize=72)
def _rows(step: Step, n: int, h: int, w: int, device: torch.device, inference: bool) -> tuple[Tensor, Tensor, Tensor]:
    ys, xs = (torch.as_tensor(v, device=device) for v in step.positions(h, w))
    image = torch.arange(n, device=device)[:, None]
    padded = image * ((h + 2) * (w + 2)) + (ys + 1) * (w + 2) + xs + 1
    flat = image * (h * w) + ys * w + xs
    rows = padded.reshape(-1), flat.reshape(-1), image.expand(n, len(ys)).reshape(-1)
    synchronize(device)
    return rows


@lru_cache(maxsize=256)
def _context_offsets(step: Step, pitch: int, latents: int, device: torch.device) -> ContextOffsets:
    names = step.input_names()
    direct = [(dy * pitch + dx) * latents for dy, dx in step.offsets] if step.signed else []
    with torch.inference_mode(False):
        kinds = torch.tensor([kind for kind, *_ in names], dtype=torch.int32)
        offsets = torch.tensor([(dy * pitch + dx) * latents + c for _, dy, dx, c in names], dtype=torch.int64)
        places = ContextOffsets(*(t.to(device) for t in (kinds, offsets, torch.tensor(direct, dtype=torch.int64))))
    synchronize(device)
    return places
