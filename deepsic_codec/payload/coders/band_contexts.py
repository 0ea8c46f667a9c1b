"""The contexts and mixers of the coder of bands, and what they start with.

They start as they are after chunks of many kinds, so that small chunks need not teach them. `docs/wavelet.md` is
normative; `deepsic_codec.training.wavelet_contexts` makes the file.
"""

import base64
import zlib
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.payload.coders.binary import SQUASH, STRETCH_MAX
from deepsic_codec.payload.coders.wavelet import MAX_LEVELS

# Levels of expected sizes, in quarters of an octave, and coarse ones.
LEVELS, COARSE = 96, 32
# Unary bins of a magnitude before the Exp-Golomb escape, and bits of the longest escape.
UNARY, ESCAPE_BITS = 14, 26
KINDS = 4 * (MAX_LEVELS + 1)  # classes of bands, by level and kind
NEAREST = 6 * 6 * 3  # patterns of the left and the upper neighbour and the coarser level
INPUTS = 5  # of a mixer: four contexts and a constant
# Mixers of a bin are two, whose weights are added: by quantiser, bin and pattern, and by class of band and bin.
PATTERN_MIXERS = 2 * 4 * NEAREST
MIXERS = PATTERN_MIXERS + KINDS * 2


class _Contexts(NamedTuple):
    """Where each family of contexts starts in their array, and the number of contexts."""

    # Families that are mixed; those of odd states follow at `odd`.
    expected: int  # magnitude bin by expected size and bin
    pattern: int  # first bin by each neighbour's size: zero, one unit, more
    later: int  # later bins by the two nearest neighbours
    kind: int  # by class of band and mean size
    plane: int  # by expected size and the coarse size in the plane before
    odd: int
    sign: int  # sign by kind and the signs of three neighbours
    low_bit: int  # the two highest bits below the unit, by expected size
    escape: int  # Exp-Golomb prefix, by position
    quiet: int  # first bin where everything around is 0, by class of band and quantiser
    empty: int  # whether a band has a coefficient that is not 0, by kind and by the plane before
    size: int


def _layout() -> _Contexts:
    sizes = [LEVELS * UNARY, 3**7, NEAREST * UNARY, KINDS * (LEVELS // 2) * 3, LEVELS * COARSE * 3]
    sizes += [sum(sizes), 4 * 27, LEVELS * 4, ESCAPE_BITS + 1, 2 * KINDS, 8]
    return _Contexts(*accumulate(sizes, initial=0))


AT = _layout()

FILE = Path(__file__).parents[2] / "data" / "wavelet-contexts.txt"
#: Units of the file: of probabilities in the logistic domain, and of weights.
LOGIT_UNIT, WEIGHT_UNIT = 32, 64


@cache
def initial() -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """Return the contexts (n,) and the weights of the mixers (m, INPUTS) at the start of a stream."""
    return unpacked(FILE.read_text())


def packed(logits: NDArray[np.int8], counts: NDArray[np.uint8], weights: NDArray[np.int16]) -> str:
    """Return the text of the file.

    Parameters
    ----------
    logits, counts : ndarray
        (n,), of each context ln(p / (1 - p)) in eighths, and the number of its observations.
    weights : ndarray
        (m, INPUTS), of the mixers, in 1/1024.
    """
    data = logits.tobytes() + counts.tobytes() + weights.astype("<i2").tobytes()
    text = base64.b85encode(zlib.compress(data, 9)).decode()
    return "".join(text[at : at + 80] + "\n" for at in range(0, len(text), 80))


def unpacked(text: str) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """Return contexts and weights from the text of the file."""
    data: Any = zlib.decompress(base64.b85decode(text.replace("\n", "")))
    logits, counts = np.frombuffer(data, np.int8, 2 * AT.size).reshape(2, -1)
    p: Any = SQUASH[logits.astype(np.int64) * LOGIT_UNIT + STRETCH_MAX].astype(np.uint32) << 6
    weights = np.frombuffer(data, "<i2", offset=2 * AT.size).astype(np.int32) * WEIGHT_UNIT
    contexts, mixers = p << 10 | counts.astype(np.uint32), weights.reshape(MIXERS, INPUTS)
    contexts.flags.writeable = mixers.flags.writeable = False
    return contexts, mixers
