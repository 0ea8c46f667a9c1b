"""Search the quality of features for a target: `psnr` or `bpp`.

A trial computes only what its target needs. PSNR is that of pixels synthesised from the symbols; nothing that was coded
is decoded again, and for `psnr` only the results are coded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import log
from typing import TYPE_CHECKING, Any, TypeVar

from deepsic_codec.codec.params import DEFAULT_QUALITY, CodecParams

if TYPE_CHECKING:
    from deepsic_codec.codec.chunk import EncodeTask
    from deepsic_codec.model.batch import Encoded, Scheduler

T = TypeVar("T")

MIN_INDEX, MAX_INDEX = 100, 10000  # quality in hundredths
MAX_TRIALS = 12
STOP_BYTES, STOP_DECIBELS = 0.01, 0.05  # a trial this close ends the search: share of the bytes, dB
# Slope of log(bytes) and of dB against the index, as a first guess before two trials are known.
SLOPE_BYTES, SLOPE_DECIBELS = 4e-4, 1.5e-3


@dataclass(frozen=True, eq=False)
class Trial:
    """An encoded chunk, with the results that its target needs."""

    encoded: "Encoded"  # symbols and label cells
    decibels: float | None = None
    payload: bytes | None = None


@dataclass
class RateSearch:
    """The search for one chunk: which quality to try next, and the trial nearest to the target."""

    params: CodecParams  # `psnr` or `bpp` is the target
    pixels: int  # slices x height x width of the chunk
    done: bool = False
    best: Trial | None = None
    _index: int = round(100 * DEFAULT_QUALITY)  # the next trial
    _excess: dict[int, float] = field(default_factory=dict)  # by index: result minus target, in dB or log(bytes)

    @property
    def quality(self) -> float:
        """The quality to try next."""
        return self._index / 100

    def add(self, trial: Trial) -> None:
        """Take the result of the trial that was to be next."""
        if self.params.psnr is not None:
            assert trial.decibels is not None
            excess, stop, slope = min(trial.decibels, 999.0) - self.params.psnr, STOP_DECIBELS, SLOPE_DECIBELS
        else:
            assert self.params.bpp is not None and trial.payload is not None
            excess, stop, slope = log(8 * len(trial.payload) / (self.params.bpp * self.pixels)), STOP_BYTES, SLOPE_BYTES
        if all(abs(excess) < abs(other) for other in self._excess.values()):
            self.best = trial
        self._excess[self._index] = excess
        self._index = self._next(slope)
        self.done = abs(excess) <= stop or self._index in self._excess or len(self._excess) >= MAX_TRIALS

    def _next(self, slope: float) -> int:
        """Return the index of the next trial, by interpolation between the closest ones on both sides."""
        below = max((index for index, excess in self._excess.items() if excess < 0), default=None)
        over = (n for n, excess in self._excess.items() if excess >= 0 and (below is None or n > below))
        above = min(over, default=None)
        if below is None or above is None:  # all trials lie on one side: extrapolate with the last slope
            edge = above if below is None else below
            assert edge is not None
            others = [index for index in self._excess if index != edge]
            if others:
                other = min(others, key=lambda index: abs(index - edge))
                slope = max(slope / 4, (self._excess[edge] - self._excess[other]) / (edge - other))
            distance = -1.2 * self._excess[edge] / slope  # a little beyond the target, to enclose it
            return int(min(MAX_INDEX, max(MIN_INDEX, round(edge + distance))))
        if above - below == 1:
            return below
        low, high = self._excess[below], self._excess[above]
        share = -low / (high - low)
        share = min(0.9, max(0.1, share)) if above - below > 20 else share
        return min(above - 1, max(below + 1, round(below + share * (above - below))))


def search_rate(tasks: Sequence["EncodeTask"], scheduler: "Scheduler") -> list[bytes]:
    """Encode chunks to the PSNR or the size in their parameters, or as near to it as possible."""
    searches = {task: RateSearch(task.params, task.chunk.axes.pixels(task.chunk.array.shape)) for task in tasks}
    while active := {task: search.quality for task, search in searches.items() if not search.done}:
        for_psnr = {task: quality for task, quality in active.items() if task.params.psnr is not None}
        for_bpp = {task: quality for task, quality in active.items() if task.params.psnr is None}
        trials: dict[EncodeTask, Trial] = encode_tasks(for_psnr, scheduler, _psnr_trial, features=False, pixels=True)
        trials |= encode_tasks(for_bpp, scheduler, _bpp_trial, features=True, pixels=False)
        for task, trial in trials.items():
            searches[task].add(trial)
    best = {task: search.best for task, search in searches.items()}
    uncoded = [(task, trial) for task, trial in best.items() if trial is not None and trial.payload is None]
    payloads = {task: trial.payload for task, trial in best.items() if trial is not None and trial.payload is not None}
    if uncoded:
        symbols: list[Any] = [trial.encoded.symbols for _, trial in uncoded]
        shapes, quantisers = zip(*((task.image_shape, trial.encoded.quantiser) for task, trial in uncoded), strict=True)
        coded = scheduler.encode_symbols(symbols, shapes, quantisers)
        for (task, trial), features in zip(uncoded, coded, strict=True):
            payloads[task] = task.pack(replace(trial.encoded, features=features))
    return [payloads[task] for task in tasks]


def encode_tasks(
    qualities: Mapping["EncodeTask", float],
    scheduler: "Scheduler",
    finish: Callable[["EncodeTask", "Encoded"], T],
    *,
    features: bool,
    pixels: bool,
    symbols: bool = True,
) -> "dict[EncodeTask, T]":
    """Analyse chunks and choose their symbols at these qualities.

    Parameters
    ----------
    qualities : mapping of EncodeTask to float
        The chunks.
    scheduler : Scheduler
        Of their model.
    finish : callable
        Makes the result of each chunk, on a thread of the scheduler.
    features, pixels, symbols : bool
        What `finish` gets of each chunk.
    """
    if not qualities:
        return {}
    results = scheduler.encode(
        [task.images() for task in qualities],
        list(qualities.values()),
        [task.params.effort for task in qualities],
        [task.params.tune for task in qualities],
        features=features,
        labels=any(task.needs_cells for task in qualities),
        symbols=symbols,
        pixels=pixels,
        finish=[partial(finish, task) for task in qualities],
    )
    return dict(zip(qualities, results, strict=True))


def _psnr_trial(task: "EncodeTask", encoded: "Encoded") -> Trial:
    decibels = task.scaled.psnr(task.decode(encoded.pixels))
    return Trial(replace(encoded, pixels=None), decibels=decibels)


def _bpp_trial(task: "EncodeTask", encoded: "Encoded") -> Trial:
    return Trial(encoded, payload=task.pack(encoded))
