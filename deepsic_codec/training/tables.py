"""Fit the entropy coder's tables (probabilities, confidences, mixers) to symbols."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from deepsic_codec.model.coding import Symbols, encode_symbols
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.payload.coders.contexts import CoderTables, ContextLayout
from deepsic_codec.payload.coders.symbols import SymbolEncoder
from deepsic_codec.training.chooser import Chosen

Sample = tuple[Symbols, float, bool]  # int16 (S,h,w,C), quality, and whether they are of a path through the trellis


def samples_of(chosen: Chosen, quality: Tensor) -> list[Sample]:
    """Return the images of a batch as chunks of their own."""
    channels_last = chosen.symbols.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    columns = channels_last[:, None], quality.tolist(), chosen.trellis.tolist()
    return list(zip(*columns, strict=True))


def total_bytes(prior: CodingPrior, tables: CoderTables, samples: Sequence[Sample]) -> int:
    """Return the bytes of all feature sections, each chunk coded separately."""
    return sum(
        len(encode_symbols(prior, tables, [symbols], [quality], trellis=trellis)[0])
        for symbols, quality, trellis in samples
    )


def average_tables(prior: CodingPrior, start: CoderTables, samples: Sequence[Sample]) -> CoderTables:
    """Run the coder over all samples without resetting it, and keep its final state, trusted as far as `limit` allows.

    The state after a long run is the average over the training images.
    """
    slow = replace(start, limit=1023, rate=2)
    last: SymbolEncoder | None = None

    def continued(tables: CoderTables, symbols: Symbols, trellis: bool) -> SymbolEncoder:
        nonlocal last
        last = SymbolEncoder(tables, symbols, trellis, continued=last)
        return last

    # two rounds: the first brings the mixers near, the second averages
    order = np.random.default_rng(0).permutation(len(samples))
    for i in np.concatenate([order, order]):
        symbols, quality, trellis = samples[i]
        encode_symbols(prior, slow, [symbols], [quality], coder=continued, trellis=trellis)
    assert last is not None
    contexts, weights = last.adaptive_state()
    return replace(
        start,
        probabilities=(contexts >> 16).astype(np.uint16),
        confidence=(contexts & 1023).astype(np.uint16),
        weights=weights.astype(np.int32),
    )


def first_tables(prior: CodingPrior, samples: Sequence[Sample]) -> CoderTables:
    """Return tables fitted to symbols without a trellis. Contexts of its odd states are those of even ones."""
    start = CoderTables.untrained(prior.latents, prior.log_scales.double().cpu().numpy())
    fitted = average_tables(prior, start, samples)
    odd, probabilities = ContextLayout.of(prior.latents).odd, fitted.probabilities.copy()
    probabilities[odd : 2 * odd] = probabilities[:odd]
    return replace(fitted, probabilities=probabilities)


def fit_tables(
    prior: CodingPrior, start: CoderTables, samples: Sequence[Sample], checks: Sequence[Sample]
) -> CoderTables:
    """Return the average state of the coder over all samples, as a start that suits each of them.

    Three settings are chosen by the bytes of `checks`, each chunk coded separately: how much the state is trusted at
    the start of a chunk (confidence), how fast contexts follow (limit), and how fast mixers learn (rate).
    """
    fitted = average_tables(prior, start, samples)
    sizes: dict[tuple[int, int, int], int] = {}

    def tables_with(confidence: int, limit: int, rate: int) -> CoderTables:
        confidences = np.minimum(fitted.confidence, confidence).astype(np.uint16)
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
