"""Fit the entropy coder's start (probabilities, confidences, mixers) to symbols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from deepsic_codec.model.coding import Symbols, encode_symbols
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.coders.symbols import SymbolEncoder

Sample = tuple[Symbols, float]  # int16 (S,h,w,C) and quality


def total_bytes(prior: CodingPrior, tables: CoderTables, samples: Sequence[Sample]) -> int:
    """Bytes of all feature sections, each chunk on its own."""
    return sum(len(encode_symbols(prior, tables, [symbols], [quality])[0]) for symbols, quality in samples)


def fit_tables(
    prior: CodingPrior,
    start: CoderTables,
    samples: Sequence[Sample],
    check: Sequence[Sample],
    report: Callable[[str], None] | None = None,
) -> CoderTables:
    """Run the coder over all samples without resetting it, and keep where it arrives.

    The state after a long run is the average over the training images; how much it is
    trusted at the start of a chunk (confidence), how fast contexts follow (limit) and how
    fast mixers learn (rate) are chosen on ``check``, each chunk coded on its own; ``report``
    gets a line for each choice.
    """
    slow = replace(start, limit=1023, rate=2)
    last: list[SymbolEncoder] = []

    def going_on(tables: CoderTables, symbols: Symbols) -> SymbolEncoder:
        coder = SymbolEncoder(tables, symbols, continued=last[-1] if last else None)
        last[:] = [coder]
        return coder

    # two rounds: the first brings the mixers near, the second averages
    order = np.random.default_rng(0).permutation(len(samples))
    for i in np.concatenate([order, order]):
        encode_symbols(prior, slow, [samples[i][0]], [samples[i][1]], coder=going_on)
    contexts, weights = last[0].adaptive_state()
    seen = (contexts & 1023).astype(np.uint16)
    best = replace(
        start, probabilities=(contexts >> 16).astype(np.uint16), weights=weights.astype(np.int32), confidence=seen
    )
    bytes_of = {}
    for confidence in (30, 60, 120, 250, 500):
        for limit, rate in ((255, 2), (1023, 2)):
            tried = replace(best, confidence=np.minimum(seen, confidence).astype(np.uint16), limit=limit, rate=rate)
            bytes_of[confidence, limit, rate] = total_bytes(prior, tried, check)
    confidence, limit, rate = min(bytes_of, key=lambda k: bytes_of[k])
    for other in (0, 1, 4, 8):
        tried = replace(best, confidence=np.minimum(seen, confidence).astype(np.uint16), limit=limit, rate=other)
        bytes_of[confidence, limit, other] = total_bytes(prior, tried, check)
    confidence, limit, rate = min(bytes_of, key=lambda k: bytes_of[k])
    if report:
        for key, size in sorted(bytes_of.items()):
            report(f"  confidence {key[0]:4d} limit {key[1]:4d} rate {key[2]}: {size} bytes")
    return replace(best, confidence=np.minimum(seen, confidence).astype(np.uint16), limit=limit, rate=rate)
