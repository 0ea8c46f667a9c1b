"""Fixed point of wavelets, and steps of their quantiser: 2^(code / 256 - 8) units of the integers that they code."""

import numpy as np

FRACTION_BITS = 4  # binary places of components and coefficients
STEPS = 8192  # codes
PER_OCTAVE = 256  # codes from a step to its double
UNIT = 256  # steps of code 0 in a unit
MANTISSA_BITS = 15
#: Steps of one octave in units of 2^-15 of the first.
MANTISSAS = tuple(round(2 ** (MANTISSA_BITS + n / PER_OCTAVE)) for n in range(PER_OCTAVE))


def step_code(step: float) -> int:
    """Return the code of the step that is nearest to this size."""
    return int(np.clip(np.rint(np.log2(step * UNIT) * PER_OCTAVE), 0, STEPS - 1))


def step_of(code: int) -> float:
    """Return the step of a code."""
    return float(MANTISSAS[code % PER_OCTAVE] * 2.0 ** (code // PER_OCTAVE - MANTISSA_BITS) / UNIT)
