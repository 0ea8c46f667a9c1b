"""Encode chunks to payloads: as features, as wavelets, or sample by sample within a bound."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import inf, sqrt
from typing import Any

from numpy.typing import NDArray

from deepsic_codec.codec.batching import Batcher, batch_limit, in_halves
from deepsic_codec.codec.chunk import ChunkToEncode, EncodeTask, find_info, scheduler_of
from deepsic_codec.codec.rate_search import encode_tasks, search_rate
from deepsic_codec.codec.scaled import WIDE, ScaledChunk, needs_range
from deepsic_codec.codec.structure import (
    fill_grids,
    find_grids,
    find_levels,
    join_grids,
    make_structure,
    on_grid,
    without_padding,
)
from deepsic_codec.codec.transform import choose_transforms
from deepsic_codec.codec.wavelet import CodedWavelets, WaveletEncoder
from deepsic_codec.errors import UnsupportedArray, counted
from deepsic_codec.model.threads import parallel_map
from deepsic_codec.payload.header import read_header, read_section
from deepsic_codec.payload.residual import Residual
from deepsic_codec.payload.sections import EMBEDDING, LABELS, RESIDUAL, STRUCTURE, VALUE_RANGE, Section
from deepsic_codec.payload.structure import Grid

Sections = dict[Section[Any], Any]

# From this number of bits in a sample on, samples in steps may be better than wavelets: they were on no scene below 1
# bit, on half of them at 2 and on all at 3.
STEPS_FROM = 1.5
MAX_STEPS = 3  # trials
CLOSE = 0.02  # deviation from a target that is accepted
MISSED = 1.25  # error of a wavelet, as a share of the allowed one, from which it counts as too coarse
MIN_LEVELS = 4  # levels of float32 in an error, from which it does not depend on them

# Ranges that values outside of them may widen for a size, which says nothing of the precision that is left.
MAX_WIDENING = 1 << 12


def encode_chunks(chunks: Sequence[ChunkToEncode]) -> list[bytes]:
    """Encode chunks of one key in one call on this thread.

    For callers that have whole batches; `ENCODER` joins the chunks of several callers.
    """
    info = find_info(*chunks[0].key)
    decided, coded = choose_transforms(chunks, info)
    tasks = [EncodeTask(chunk, info) for chunk in decided]
    payloads = {tasks[number]: payload for number, payload in coded.items()}
    payloads |= {task: task.pack_sections({}, task.quality) for task in tasks if task.scaled.empty}
    with_data = [task for task in tasks if not task.scaled.empty]
    _warn_of_range(with_data)
    payloads |= _encode_features([task for task in with_data if task.chunk.features and task not in payloads])
    others = [task for task in with_data if not task.chunk.features]
    _score(others)
    payloads |= zip(others, parallel_map(_encode_other, others), strict=True)
    lossy = [task for task in with_data if task.params.max_error is None]
    # Who passes transform="features" gets features.
    passed = {task for task, chunk in zip(tasks, chunks, strict=True) if chunk.params.transform == "features"}
    few = [task for task in lossy if task not in passed and task.scaled.qualities is None]
    few = [task for task in few if task.scaled.has_few_values]
    exact = dict(zip(few, parallel_map(lambda task: _without_loss(task, payloads[task]), few), strict=True))
    payloads |= {task: payload for task, payload in exact.items() if payload is not None}
    if any(task.scaled.is_classes for task in lossy if exact.get(task) is None):
        warnings.warn(
            "samples look like a mask or a map of classes, to which errors would add other classes; pass max_error=0, "
            "which stores them without loss in few bytes",
            stacklevel=2,
        )
    return [payloads[task] for task in tasks]


def _without_loss(task: EncodeTask, payload: bytes) -> bytes | None:
    """Return the payload of samples without loss; None if it takes more bytes than this one and than the target."""
    max_bytes = max(len(payload), (task.params.bpp or 0) * task.chunk.axes.pixels(task.chunk.array.shape) / 8)
    max_bytes *= 1 + CLOSE
    if task.scaled.least_bytes > max_bytes:
        return None
    header = read_header(payload)
    labels: Sections = {
        LABELS: read_section(payload, header, LABELS),
        EMBEDDING: read_section(payload, header, EMBEDDING),
    }
    if task.chunk.features:
        task = EncodeTask(replace(task.chunk, params=task.params.changed(transform="wavelet")), task.info)
    exact = task.pack_sections({**_bounded(task.scaled, 0), **labels}, header.quality)
    return exact if len(exact) <= max_bytes else None


def _warn_of_range(tasks: Sequence[EncodeTask]) -> None:
    """Warn of chunks whose quality refers to the range of their dtype, of which the samples use little."""
    for dtype in {
        task.scaled.samples.dtype
        for task in tasks
        if task.params.value_range is None
        and task.scaled.samples.dtype in WIDE
        and needs_range(task.params)
        and task.scaled.is_narrow
    }:
        warnings.warn(  # one text for all chunks, so that it is shown once
            f"value_range: samples use under a quarter of the values of {dtype}, to which quality and psnr refer; pass "
            "value_range=(low, high), the range of the whole array, or rmse= or max_error=, which need none",
            stacklevel=2,
        )


def _encode_features(tasks: Sequence[EncodeTask]) -> dict[EncodeTask, bytes]:
    if not tasks:
        return {}
    if clipped := sum(task.scaled.outside() for task in tasks):
        warnings.warn(
            f"value_range: features clip {counted(clipped, 'sample')} outside of it; pass a wider range, or "
            "transform='wavelet', which keeps them",
            stacklevel=2,
        )
    scheduler = scheduler_of(tasks[0].info)
    searched = [task for task in tasks if task.params.quality is None]  # psnr=, bpp=
    payloads: dict[EncodeTask, bytes] = {}
    if searched:
        payloads |= zip(searched, search_rate(searched, scheduler), strict=True)
    qualities = {task: task.quality for task in tasks if task.params.quality is not None}
    return payloads | encode_tasks(qualities, scheduler, EncodeTask.pack, features=True, pixels=False, symbols=False)


def _score(tasks: Sequence[EncodeTask]) -> None:
    """Score the labels of chunks without features."""
    scored = [task for task in tasks if task.needs_cells or task.chunk.keep]
    if not scored:
        return
    images = [task.label_images() for task in scored]
    qualities = [task.quality for task in scored]
    results = scheduler_of(scored[0].info).encode(images, qualities, [0] * len(scored), features=False, labels=True)
    for task, result in zip(scored, results, strict=True):
        task.cells = result.cells
        if task.chunk.keep:
            task.keep_labels()


def _encode_other(task: EncodeTask) -> bytes:
    params, scaled = task.params, task.scaled
    if params.max_error is not None:
        return task.pack_sections(_bounded(scaled, params.max_error), task.quality, task.cells)
    encoder = WaveletEncoder(scaled, params)
    limit = None
    quality = None if params.quality is None else scaled.finest or params.quality
    if quality is not None:
        wavelet = encoder.at_quality(quality)
    elif params.bpp is not None:
        if scaled.widening > MAX_WIDENING:
            raise UnsupportedArray(
                f"bpp: samples of the chunk are up to {scaled.widening:.3g} value ranges apart, which leaves no "
                "precision for the others; set outliers to the NoData value, or pass rmse or max_error, which keep them"
            )
        rest = len(task.pack_sections(encoder.sections(None), task.quality, task.cells))
        limit = params.bpp * task.chunk.axes.pixels(task.chunk.array.shape) / 8 - rest
        wavelet = encoder.for_bytes(limit)
    elif params.psnr is not None:
        wavelet = encoder.for_psnr(params.psnr)
    else:
        assert params.rmse is not None
        wavelet = encoder.for_rmse(params.rmse)
    sections: Sections | None = None
    allowed = scaled.allowed_error(params)
    coarse = scaled.samples.dtype.kind == "f" and allowed is not None and allowed < MIN_LEVELS * scaled.level
    high = params.effort > 0 and 8 * wavelet.nbytes > STEPS_FROM * encoder.samples
    if scaled.qualities is None and (coarse or high):  # samples in steps have one error everywhere
        decoded = encoder.decode(wavelet)
        sections = _in_steps(scaled, encoder.grids, wavelet, decoded, limit, allowed if coarse else None)
    if sections is None:
        sections = encoder.sections(wavelet)
        if scaled.ranges is not None:
            sections |= {VALUE_RANGE: scaled.ranges if scaled.coded_ranges is None else scaled.coded_ranges}
    quality = encoder.quality_of(wavelet.code) if quality is None else quality
    return task.pack_sections(sections, quality, task.cells)


def _bounded(scaled: ScaledChunk, max_error: float) -> Sections:
    """Code samples within a bound."""
    grids = find_grids(scaled.samples)
    if grids:
        return {STRUCTURE: fill_grids(grids, [_bounded_grid(on_grid(scaled, grid), max_error) for grid in grids])}
    return _bounded_grid(scaled, max_error)


def _bounded_grid(scaled: ScaledChunk, max_error: float) -> Sections:
    """Code the samples of one grid, which has no coarser grids, though its pixels may be repeated, too."""
    scaled, padding = without_padding(scaled, max_error)
    structure = make_structure(find_levels(scaled.samples, scaled.mask, max_error), padding)
    return {RESIDUAL: scaled.bounded_residual(max_error, structure), STRUCTURE: structure}


def _in_steps(
    scaled: ScaledChunk,
    grids: tuple[Grid, ...],
    wavelet: CodedWavelets,
    decoded: NDArray[Any],
    limit: float | None,
    allowed: float | None,
) -> Sections | None:
    """Code samples in steps, as within a bound, if that is better than a wavelet and what it decodes to.

    With a limit in bytes, better is a smaller error in as many bytes; without, fewer bytes for as small an error. If
    integers of float32 are so coarse that a wavelet misses the allowed error, steps keep it.
    """
    largest = wavelet.nbytes if limit is None else max(limit, wavelet.nbytes) * (1 + CLOSE)
    # Few levels may take less than any error.
    if not grids and find_levels(scaled.samples, scaled.mask, 0) is not None:
        exact = _bounded(scaled, 0)
        if len(exact[RESIDUAL].coded) <= largest:
            return exact
    chunks = [on_grid(scaled, grid) for grid in grids] or [scaled]
    parts = [without_padding(chunk, None) for chunk in chunks]
    measured = scaled if grids else parts[0][0]
    error, samples = measured.rmse(decoded), sum(part.samples.size for part, _ in parts)
    least = measured.min_step
    if allowed is not None and error > MISSED * allowed:
        error, largest, least = allowed, inf, 0.0
    elif 8 * wavelet.nbytes <= STEPS_FROM * samples:
        return None
    # Of integers, a step has to be a whole number: a little more than a bound asks for, so that none is missed.
    step = error * sqrt(12) * (1.0 if limit is None else 1.1)
    best: list[Residual] | None = None
    for _ in range(MAX_STEPS):
        # An error of a grid is repeated, so its step is finer by its factor.
        factors = [grid.factor for grid in grids] or [1]
        steps = [max(step / factor, least) for factor in factors]
        pairs = [part.stepped_residual(one) for (part, _), one in zip(parts, steps, strict=True)]
        residuals, restored = [residual for residual, _ in pairs], [one for _, one in pairs]
        reached = measured.rmse(join_grids(grids, restored, scaled.samples.shape) if grids else restored[0])
        nbytes = sum(len(residual.coded) for residual in residuals)
        if limit is None:
            if nbytes < largest and (reached <= error * (1 + CLOSE) or largest == inf):
                best = residuals
            if reached <= error * (1 + CLOSE) or nbytes >= largest:  # smaller steps take more bytes
                break
            step *= error / reached / (1 + CLOSE)
        else:
            if best is None and nbytes > wavelet.nbytes * (1 + CLOSE):
                break
            if nbytes <= largest and reached < error:
                error, best = reached, residuals
            if abs(nbytes / limit - 1) <= CLOSE or (nbytes < limit and max(steps) <= measured.min_step):
                break
            # Of integers, a step has to be a whole number: the next smaller one may take too many bytes.
            step *= 2 ** (8 * (nbytes - limit) / samples)
    if best is None:
        return None
    sections: list[Sections] = [
        {RESIDUAL: residual, STRUCTURE: make_structure(None, padding)}
        for residual, (_, padding) in zip(best, parts, strict=True)
    ]
    return {STRUCTURE: fill_grids(grids, sections)} if grids else sections[0]


ENCODER = Batcher(in_halves(encode_chunks), batch_limit)
