"""Search the quality of a chunk that has a target: `psnr` or `bpp`.

First the quality is searched. Features cannot restore all fine detail, but a residual can. If the quality is high, or
the target is out of reach, the step of a residual is searched, too, and the better of the two results is kept.

A trial computes only what its target needs. PSNR is that of pixels synthesised from the symbols; nothing that was coded
is decoded again, and for `psnr` only the results are coded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import log, log2, sqrt
from typing import TYPE_CHECKING, TypeVar

from deepsic_codec.codec.params import BOUNDED_QUALITY, DEFAULT_QUALITY, CodecParams

if TYPE_CHECKING:
    from deepsic_codec.codec.chunk import EncodeTask
    from deepsic_codec.model.scheduler import Encoded, Scheduler

T = TypeVar("T")

MIN_INDEX, MAX_INDEX = 100, 10000  # quality in hundredths
RESIDUAL_ABOVE = 5000  # up to this quality no residual is tried
PER_OCTAVE = 100  # steps of a residual between a step and its double; step 0 is the whole value range
MAX_TRIALS = 12  # of the quality, and of the step
STOP_BYTES, STOP_DECIBELS = 0.01, 0.05  # a trial this close ends the search: share of the bytes, dB
ACCEPT_BYTES, ACCEPT_DECIBELS = 0.03, 0.2  # a trial this close reaches the target
# Slope of log(bytes) and of dB against the index of quality and of step, as a first guess before two trials are known.
SLOPE_BYTES, SLOPE_DECIBELS = (4e-4, 5e-3), (1.5e-3, 6 / PER_OCTAVE)


@dataclass(frozen=True, eq=False)
class Trial:
    """One way to encode a chunk, with the results that were computed so far."""

    quality: float  # of the features
    step: float | None = None  # of the residual; None for no residual
    decibels: float | None = None
    payload: bytes | None = None
    encoded: "Encoded | None" = None  # symbols and label cells

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        assert self.payload is not None
        return len(self.payload)


@dataclass
class RateSearch:
    """The search for one chunk: which quality or step to try next, and which trials to choose from."""

    params: CodecParams  # `psnr` or `bpp` is the target
    pixels: int  # slices x height x width of the chunk
    extent: float  # size of the value range
    min_step: float  # smallest step of a residual
    done: bool = False
    _with_residual: bool = False  # whether the step of a residual is searched
    _index: int = round(100 * DEFAULT_QUALITY)  # the next trial: hundredths of quality, or index of the step
    _excess: dict[int, float] = field(default_factory=dict)  # by index: result minus target, in dB or log(bytes)
    _closest: dict[bool, tuple[float, Trial]] = field(default_factory=dict)  # without and with a residual

    @property
    def quality(self) -> float:
        """The quality to try next."""
        return BOUNDED_QUALITY if self._with_residual else self._index / 100

    @property
    def step(self) -> float | None:
        """The step of the residual to try next; None for no residual."""
        return self.extent * 2 ** (-self._index / PER_OCTAVE) if self._with_residual else None

    @property
    def candidates(self) -> list[Trial]:
        """The trials to choose from: those that reach the target or are better, else the closest one."""
        trials = [trial for _, trial in self._closest.values()]
        if self.params.psnr is not None:
            limit = self.params.psnr - ACCEPT_DECIBELS
            acceptable = [trial for trial in trials if trial.decibels is not None and trial.decibels >= limit]
        else:
            max_bytes = (self.params.bpp or 0) * self.pixels / 8 * (1 + ACCEPT_BYTES)
            acceptable = [trial for trial in trials if trial.nbytes <= max_bytes]
        return acceptable or [min(self._closest.values(), key=lambda pair: pair[0])[1]]

    def add(self, trial: Trial) -> None:
        """Take the result of the trial that was to be next."""
        if self.params.psnr is not None:
            assert trial.decibels is not None
            excess, stop = min(trial.decibels, 999.0) - self.params.psnr, STOP_DECIBELS
            slope = SLOPE_DECIBELS[self._with_residual]
        else:
            assert self.params.bpp is not None
            excess, stop = log(8 * trial.nbytes / (self.params.bpp * self.pixels)), STOP_BYTES
            slope = SLOPE_BYTES[self._with_residual]
        miss = abs(excess)
        if self._with_residual not in self._closest or miss < self._closest[self._with_residual][0]:
            self._closest[self._with_residual] = miss, trial
        self._excess[self._index] = excess
        self._index = self._next(slope)
        close = self._closest[self._with_residual][0] <= stop
        finished = close or self._index in self._excess or len(self._excess) >= MAX_TRIALS
        if finished and not self._with_residual:
            closest = min(self._excess, key=lambda index: abs(self._excess[index]))
            if closest > RESIDUAL_ABOVE:
                self._start_residual()
                return
        self.done = finished

    def _start_residual(self) -> None:
        self._with_residual, self._excess = True, {}
        psnr = self.params.psnr
        step = self.extent / 16 if psnr is None else sqrt(12) * self.extent * 10 ** (-psnr / 20)
        self._index = min(self._max_index, max(0, round(PER_OCTAVE * log2(self.extent / step))))

    @property
    def _max_index(self) -> int:
        if not self._with_residual:
            return MAX_INDEX
        return max(0, round(PER_OCTAVE * log2(self.extent / self.min_step)))

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
            return int(min(self._max_index, max(0 if self._with_residual else MIN_INDEX, round(edge + distance))))
        if above - below == 1:
            return below
        low, high = self._excess[below], self._excess[above]
        share = -low / (high - low)
        share = min(0.9, max(0.1, share)) if above - below > 20 else share
        return min(above - 1, max(below + 1, round(below + share * (above - below))))


def search_rate(tasks: Sequence["EncodeTask"], scheduler: "Scheduler") -> list[bytes]:
    """Encode chunks to the PSNR or the size in their parameters, or as near to it as possible."""
    searches: dict[EncodeTask, RateSearch] = {}
    for task in tasks:
        pixels, scaled = task.chunk.axes.pixels(task.chunk.array.shape), task.scaled
        searches[task] = RateSearch(task.params, pixels, scaled.extent, scaled.min_step)
    labels: dict[EncodeTask, Encoded | None] = {}
    while active := [task for task in tasks if not searches[task].done]:
        steps = [task for task in active if searches[task].step is not None]
        new = [task for task in steps if task not in labels]
        labels |= zip(new, encode_labels(new, scheduler), strict=True)
        qualities = {task: searches[task].quality for task in active if searches[task].step is None}
        for_psnr = {task: quality for task, quality in qualities.items() if task.params.psnr is not None}
        for_bpp = {task: quality for task, quality in qualities.items() if task.params.psnr is None}
        trials: dict[EncodeTask, Trial] = encode_tasks(for_psnr, scheduler, _psnr_trial, features=False, pixels=True)
        trials |= encode_tasks(for_bpp, scheduler, _bpp_trial, features=True, pixels=False)
        widths = [searches[task].step for task in steps]
        measured = scheduler.map(_residual_trial, steps, [labels[task] for task in steps], widths)
        trials |= zip(steps, measured, strict=True)
        for task, trial in trials.items():
            searches[task].add(trial)
    return _best({task: searches[task].candidates for task in tasks}, scheduler)


def encode_labels(tasks: Sequence["EncodeTask"], scheduler: "Scheduler") -> "list[Encoded | None]":
    """Return what payloads with a residual have beside it: label cells, or features for semantics="post"."""
    columns: dict[EncodeTask, Encoded | None] = dict.fromkeys(tasks)
    for semantics in ("pre", "post"):
        qualities = {task: task.quality for task in tasks if task.params.semantics == semantics}
        columns |= encode_tasks(qualities, scheduler, _keep, features=semantics == "post", pixels=False, symbols=False)
    return list(columns.values())


def _keep(task: "EncodeTask", quality: float, encoded: "Encoded") -> "Encoded":
    return encoded


def encode_tasks(
    qualities: Mapping["EncodeTask", float],
    scheduler: "Scheduler",
    finish: Callable[["EncodeTask", float, "Encoded"], T],
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
        labels=any(task.params.semantics == "pre" for task in qualities),
        symbols=symbols,
        pixels=pixels,
        finish=[partial(finish, task, quality) for task, quality in qualities.items()],
    )
    return dict(zip(qualities, results, strict=True))


def _psnr_trial(task: "EncodeTask", quality: float, encoded: "Encoded") -> Trial:
    decibels = task.scaled.psnr(task.decode(encoded.pixels))
    return Trial(quality, decibels=decibels, encoded=replace(encoded, pixels=None))


def _bpp_trial(task: "EncodeTask", quality: float, encoded: "Encoded") -> Trial:
    return Trial(quality, payload=task.pack(encoded, quality), encoded=encoded)


def _residual_trial(task: "EncodeTask", labels: "Encoded | None", step: float) -> Trial:
    residual, decoded = task.scaled.stepped_residual(step)
    return Trial(BOUNDED_QUALITY, step, task.scaled.psnr(decoded), task.pack(labels, BOUNDED_QUALITY, residual))


def _best(candidates: Mapping["EncodeTask", list[Trial]], scheduler: "Scheduler") -> list[bytes]:
    """Return the payload of the best candidate of each chunk: the smallest for a PSNR, the most exact for a size."""
    uncoded: list[tuple[EncodeTask, Trial]] = []
    unmeasured: list[tuple[EncodeTask, Trial]] = []  # a single candidate with a payload needs no PSNR
    completed: dict[Trial, Trial] = {}
    for task, trials in candidates.items():
        for trial in trials:
            if trial.payload is not None and len(trials) == 1:
                continue
            if trial.step is None:
                (uncoded if trial.payload is None else unmeasured).append((task, trial))
    if uncoded:
        features = scheduler.encode_symbols(*_symbol_columns(uncoded))
        for (task, trial), data in zip(uncoded, features, strict=True):
            assert trial.encoded is not None
            payload = task.pack(replace(trial.encoded, features=data), trial.quality)
            completed[trial] = replace(trial, payload=payload)
    for q6 in (False, True):
        pairs = [(task, trial) for task, trial in unmeasured if task.q6 == q6]
        if pairs:
            for (task, trial), pixels in zip(pairs, scheduler.synthesise(*_symbol_columns(pairs), q6), strict=True):
                completed[trial] = replace(trial, decibels=task.scaled.psnr(task.decode(pixels)))
    payloads = []
    for task, trials in candidates.items():
        known = [completed.get(trial, trial) for trial in trials]
        if task.params.psnr is not None:
            best = min(known, key=lambda trial: trial.nbytes)
        else:
            best = max(known, key=lambda trial: trial.decibels or 0.0)
        assert best.payload is not None
        payloads.append(best.payload)
    return payloads


def _symbol_columns(
    pairs: Sequence[tuple["EncodeTask", Trial]],
) -> tuple[list, list[tuple[int, int, int]], list[float]]:
    symbols = [None if trial.encoded is None else trial.encoded.symbols for _, trial in pairs]
    return symbols, [task.image_shape for task, _ in pairs], [trial.quality for _, trial in pairs]
