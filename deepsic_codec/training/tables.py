"""Fit the entropy coder's tables (probabilities, confidences, mixers) to symbols."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from deepsic_codec.model.coding import Symbols, encode_symbols
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.coders.symbols import SymbolEncoder

Sample = tuple[Symbols, float]  # int16 (S,h,w,C) and quality


def total_bytes(prior: CodingPrior, tables: CoderTables, samples: Sequence[Sample]) -> int:
    """Return the bytes of all feature sections, each chunk coded separately."""
    return sum(len(encode_symbols(prior, tables, [symbols], [quality])[0]) for symbols, quality in samples)


def fit_tables(
    prior: CodingPrior, start: CoderTables, samples: Sequence[Sample], checks: Sequence[Sample]
) -> CoderTables:
    """Run the coder over all samples without resetting it, and keep its final state.

    The state after a long run is the average over the training images. Three settings are chosen by the bytes of
    `checks`, each chunk coded separately: how much the state is trusted at the start of a chunk (confidence), how fast
    contexts follow (limit), and how fast mixers learn (rate).
    """
    slow = replace(start, limit=1023, rate=2)
    last: SymbolEncoder | None = None

    def continued(tables: CoderTables, symbols: Symbols) -> SymbolEncoder:
        nonlocal last
        last = SymbolEncoder(tables, symbols, continued=last)
        return last

    # two rounds: the first brings the mixers near, the second averages
    order = np.random.default_rng(0).permutation(len(samples))
    for i in np.concatenate([order, order]):
        encode_symbols(prior, slow, [samples[i][0]], [samples[i][1]], coder=continued)
    assert last is not None
    contexts, weights = last.adaptive_state()
    counts = (contexts & 1023).astype(np.uint16)
    fitted = replace(start, probabilities=(contexts >> 16).astype(np.uint16), weights=weights.astype(np.int32))
    sizes: dict[tuple[int, int, int], int] = {}

    def tables_with(confidence: int, limit: int, rate: int) -> CoderTables:
        confidences = np.minimum(counts, confidence).astype(np.uint16)
        return replace(fitted, confidence=confidences, limit=limit, rate=rate)

    def measure(confidence: int, limit: int, rate: int) -> None:
        sizes[confidence, limit, rate] = total_bytes(prior, tables_with(confidence, limit, rate), checks)

    for confidence in (30, 60, 120, 250, 500):
        for limit in (255, 1023):
            measure(confidence, limit, 2)
    confidence, limit, _ = min(sizes, key=lambda key: sizes[key])
    for rate in (0, 1, 4, 8):
        measure(confidence, limit, rate)
    return tables_with(*min(sizes, key=lambda key: sizes[key]))
