"""Find how to encode a chunk so that it has the size or the PSNR asked for, by encoding it.

First the quality is searched. Features have a ceiling, though: what they leave of fine detail, more of them hardly
brings back, and a residual does. If the quality comes out high, or short of what is asked, and the model decodes
exactly, the step of a residual is searched as well, and the better of the two kept.
"""

from dataclasses import dataclass, field
from math import log, log2, sqrt
from typing import Any

from deepsic_codec.codec.params import BOUNDED_QUALITY, DEFAULT_QUALITY, CodecParams

LEAST, MOST = 100, 10000  # hundredths of quality
ENOUGH = 5000  # up to this quality no residual is tried
OCTAVE = 100  # steps of a residual in between one and its double
COARSEST = 1  # so many steps make the range
TRIALS = 12  # at most, of either kind
NEAR_BYTES, NEAR_DECIBELS = 0.01, 0.05  # near enough to stop: a share of the bytes, dB
HIT_BYTES, HIT_DECIBELS = 0.03, 0.2  # near enough to count as found
# A first guess, until two are met, of how log(bytes) and dB rise from one quality or residual to the next.
RISE_BYTES, RISE_DECIBELS = (4e-4, 5e-3), (1.5e-3, 6 / OCTAVE)


@dataclass(frozen=True)
class Trial:
    """What came of encoding a chunk: anything to keep, its bytes, its PSNR in dB."""

    result: Any
    nbytes: int
    decibels: float


@dataclass
class Search:
    """The search for one chunk; a chunk of fixed quality is found at the first trial.

    Parameters
    ----------
    config : CodecParams
        Its `psnr` or `bpp` is what is looked for.
    pixels : int
        Slices x height x width of the chunk.
    extent : float
        Of the value range.
    finest : float or None
        The smallest step of a residual; None if there can be no residual.
    """

    config: CodecParams
    pixels: int
    extent: float
    finest: float | None
    done: bool = False
    _residual: bool = False  # whether the step of a residual is searched by now
    _number: int = 0  # what to try next: hundredths of quality, or how fine the residual is
    _met: dict[int, float] = field(default_factory=dict)  # how much too much there was
    _best: dict[bool, tuple[float, Trial]] = field(default_factory=dict)  # the nearest, without and with a residual

    def __post_init__(self) -> None:
        self._number = round(100 * (DEFAULT_QUALITY if self.config.quality is None else self.config.quality))

    @property
    def quality(self) -> float:
        """The quality to try next."""
        return BOUNDED_QUALITY if self._residual else self._number / 100

    @property
    def step(self) -> float | None:
        """The step of the residual to try next; None for no residual."""
        return self.extent / COARSEST * 2 ** (-self._number / OCTAVE) if self._residual else None

    @property
    def best(self) -> Any:
        """The result to keep: what is better than asked, and costs less, is as good as a hit."""
        nearest = min(self._best.values(), key=lambda pair: pair[0])[1]
        trials = [trial for _, trial in self._best.values()]
        if self.config.psnr is not None:
            good = [trial for trial in trials if trial.decibels >= self.config.psnr - HIT_DECIBELS]
            return min(good, key=lambda trial: trial.nbytes, default=nearest).result
        most = (self.config.bpp or 0) * self.pixels / 8 * (1 + HIT_BYTES)
        good = [trial for trial in trials if trial.nbytes <= most]
        return max(good, key=lambda trial: trial.decibels, default=nearest).result

    def add(self, trial: Trial) -> None:
        """Take in what the trial gave."""
        if self.config.psnr is not None:
            excess, near = min(trial.decibels, 999.0) - self.config.psnr, NEAR_DECIBELS
            rise = RISE_DECIBELS[self._residual]
        elif self.config.bpp is not None:
            excess, near = log(8 * trial.nbytes / (self.config.bpp * self.pixels)), NEAR_BYTES
            rise = RISE_BYTES[self._residual]
        else:
            self._best[False], self.done = (0.0, trial), True
            return
        miss = abs(excess)
        if self._residual not in self._best or miss < self._best[self._residual][0]:
            self._best[self._residual] = miss, trial
        self._met[self._number] = excess
        self._number = self._next(rise)
        found = self._best[self._residual][0] <= near or self._number in self._met or len(self._met) >= TRIALS
        if found and not self._residual and self.finest is not None:
            nearest = min(self._met, key=lambda number: abs(self._met[number]))
            if nearest > ENOUGH:
                self._begin_residual()
                return
        self.done = found

    def _begin_residual(self) -> None:
        self._residual, self._met = True, {}
        step = self.extent / 16
        if self.config.psnr is not None:
            step = sqrt(12) * self.extent * 10 ** (-self.config.psnr / 20)
        self._number = min(self._most, max(0, round(OCTAVE * log2(self.extent / COARSEST / step))))

    @property
    def _most(self) -> int:
        if not self._residual:
            return MOST
        assert self.finest is not None
        return max(0, round(OCTAVE * log2(self.extent / COARSEST / self.finest)))

    def _next(self, rise: float) -> int:
        below = max((number for number, excess in self._met.items() if excess < 0), default=None)
        over = (n for n, excess in self._met.items() if excess >= 0 and (below is None or n > below))
        above = min(over, default=None)
        if below is None or above is None:  # on one side of it so far: go on as steeply as it went
            edge = above if below is None else below
            assert edge is not None
            others = [number for number in self._met if number != edge]
            if others:
                other = min(others, key=lambda number: abs(number - edge))
                rise = max(rise / 4, (self._met[edge] - self._met[other]) / (edge - other))
            step = -1.2 * self._met[edge] / rise  # a little beyond, to have it between two
            return int(min(self._most, max(0 if self._residual else LEAST, round(edge + step))))
        if above - below == 1:
            return below
        low, high = self._met[below], self._met[above]
        share = -low / (high - low)
        share = min(0.9, max(0.1, share)) if above - below > 20 else share
        return min(above - 1, max(below + 1, round(below + share * (above - below))))
