"""The coding order of symbols, and the order of the prior's inputs.

Channels are split into groups that are coded one after another, and the positions of each group into spatial steps, so
that a step has the symbols of all earlier groups on all sides and, after the first step of its group, neighbours of its
own group:

    group 0, three steps       later groups, two steps
        A C A C                    1 2 1 2
        C B C B                    2 1 2 1
        A C A C                    1 2 1 2
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Offsets (dy,dx) of neighbouring positions.
Offsets = tuple[tuple[int, int], ...]
CROSS: Offsets = ((0, -1), (0, 1), (-1, 0), (1, 0))
DIAGONAL: Offsets = ((-1, -1), (-1, 1), (1, -1), (1, 1))
CENTRE: Offsets = ((0, 0),)
#: First row and column of the grids of positions that a step consists of; a grid has every second row and column.
STARTS: dict[str, Offsets] = {
    "A": ((0, 0),),
    "B": ((1, 1),),
    "C": ((0, 1), (1, 0)),
    "1": ((0, 0), (1, 1)),
    "2": ((0, 1), (1, 0)),
}
#: Kinds of features: companded magnitudes, and clipped symbols with their signs.
MAGNITUDE, LINEAR = 0, 1


class Inputs(NamedTuple):
    """Features, `MAGNITUDE` or `LINEAR`, of a range of channels at neighbours; offset by offset, channel by channel."""

    kind: int
    offsets: Offsets
    first: int
    stop: int

    @property
    def size(self) -> int:
        """Number of features."""
        return len(self.offsets) * (self.stop - self.first)


class Grid(NamedTuple):
    """Positions of every second row and column: the first row and column, and their numbers."""

    y: int
    x: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Step:
    """One step of the coding order.

    Attributes
    ----------
    start, count : int
        Channels of its group.
    mask : str
        Positions, a key of `STARTS`.
    offsets : Offsets
        Neighbouring positions at which symbols of its own group are known.
    detail : int
        Number of leading channels that contexts contain with their signs, and diagonally.
    """

    start: int
    count: int
    mask: str
    offsets: Offsets
    detail: int

    @property
    def second(self) -> bool:
        """Whether neighbours of the same group are known."""
        return bool(self.offsets)

    @property
    def signed(self) -> bool:
        """Whether neighbours of the same group are known with their signs."""
        return self.second and self.start < self.detail

    @property
    def channels(self) -> slice:
        """Channels of its group."""
        return slice(self.start, self.start + self.count)

    def grids(self, height: int, width: int) -> list[Grid]:
        """Positions of the step, grid by grid; grids may be empty."""
        return [Grid(y, x, (height - y + 1) // 2, (width - x + 1) // 2) for y, x in STARTS[self.mask]]

    def positions(self, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and columns of the step's positions in coding order, row by row."""
        mask = np.zeros((height, width), bool)
        for y, x in STARTS[self.mask]:
            mask[y::2, x::2] = True
        ys, xs = np.nonzero(mask)
        return ys.astype(np.int64), xs.astype(np.int64)

    def position_count(self, height: int, width: int) -> int:
        """Number of positions."""
        return sum(grid.rows * grid.columns for grid in self.grids(height, width))

    @property
    def inputs(self) -> tuple[Inputs, ...]:
        """All features that the prior's network of this step reads, in their order."""
        return _inputs(self)

    @property
    def input_count(self) -> int:
        """Number of features."""
        return sum(part.size for part in self.inputs)

    @property
    def direct_inputs(self) -> slice:
        """Columns of the features that also predict the mean directly: the group's own signed neighbours."""
        count = len(self.offsets) * self.count if self.signed else 0
        return slice(count, 2 * count)

    def input_names(self) -> list[tuple[int, int, int, int]]:
        """Kind, dy, dx and channel of each feature."""
        return [
            (part.kind, dy, dx, channel)
            for part in self.inputs
            for dy, dx in part.offsets
            for channel in range(part.first, part.stop)
        ]


@lru_cache(maxsize=64)
def _inputs(step: Step) -> tuple[Inputs, ...]:
    group, detailed = (step.start, step.start + step.count), (0, min(step.start, step.detail))
    parts = (
        Inputs(MAGNITUDE, step.offsets, *group),
        Inputs(LINEAR, step.offsets if step.signed else (), *group),
        Inputs(MAGNITUDE, CENTRE + CROSS, 0, step.start),
        Inputs(MAGNITUDE, DIAGONAL, *detailed),
        Inputs(LINEAR, CENTRE + CROSS, *detailed),
    )
    return tuple(part for part in parts if part.size)


def schedule(groups: Sequence[int], detail: int) -> list[Step]:
    """All steps in coding order, for groups of channels, the first `detail` channels in detail."""
    out: list[Step] = []
    start = 0
    for i, count in enumerate(groups):
        steps = (("A", ()), ("B", DIAGONAL), ("C", CROSS)) if i == 0 else (("1", ()), ("2", CROSS))
        out += [Step(start, count, mask, offsets, detail) for mask, offsets in steps]
        start += count
    return out
