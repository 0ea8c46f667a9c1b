"""From trained networks to a model file: integer prior, the coder's tables, weights, vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deepsic_codec.model.architecture import Architecture, Sizes
from deepsic_codec.model.exact.export import export_gains, export_network
from deepsic_codec.model.family import ANALYSIS, GAINS, HEAD, RDO, SYNTHESIS
from deepsic_codec.model.file import Arrays, ModelInfo, load_arrays, save_model
from deepsic_codec.model.prior import Prior
from deepsic_codec.model.quantise import make_tables
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.training.fold import fold_blocks, idle_blocks
from deepsic_codec.training.log import Log
from deepsic_codec.training.loss import Networks
from deepsic_codec.training.measure import QUALITIES, accuracy
from deepsic_codec.training.phases import integer_head
from deepsic_codec.training.run import BATCH, Run
from deepsic_codec.training.tables import Sample, fit_tables, total_bytes

#: Vocabulary of a model that was trained without labels.
NO_WORDS = Vocabulary((), {})
#: Batches of training images on which a block has to do nothing to be left out.
IDLE_BATCHES = 48


def write_model(run: Run, log: Log) -> ModelInfo:
    """Fit the coder's tables to the trained networks and write the model file; prints what each step is worth."""
    s, nets = run.settings, run.nets
    _finish_head(run, log)
    if hasattr(nets, "prior"):
        held_out = run.collect_symbols(max(2, s.symbol_batches // 25), s.seed + 2)
        promised = estimate(nets.prior, *held_out, True)
        log.say(f"integer prior: {promised:.4f} bpp promised, on crops that it was not fitted to")
    exported, log_scales = nets.export_prior(), run.integer_prior.log_scales.double().cpu().numpy()
    prior = nets.integer_prior(exported, "cpu")
    fitted, checked = (
        samples(run.collect_symbols(-(-count // BATCH), s.seed + seed), count)
        for count, seed in ((s.table_samples, 4), (s.table_checks, 5))
    )
    pixels = sum(symbols.shape[1] * symbols.shape[2] * 256 for symbols, _ in checked)
    start = CoderTables.untrained(nets.arch.latents, log_scales)
    log.say(f"coder, untrained tables: {total_bytes(prior, start, checked) * 8 / pixels:.4f} bpp")
    tables = fit_tables(prior, start, fitted, checked, log.say)
    log.say(f"coder, fitted tables: {total_bytes(prior, tables, checked) * 8 / pixels:.4f} bpp")
    arrays: Arrays = {f"decoder.prior.{k}": v.cpu().numpy() for k, v in exported.items()}
    arrays |= {f"decoder.coder.{k}": v for k, v in tables.arrays().items()}
    if run.rdo_tables is not None:
        made = make_tables(run.integer_prior.log_scales, export_gains(nets.gains)["step"])
        arrays |= {f"{RDO}.{name}": table.numpy() for name, table in made.items()}
    arrays |= transforms(nets) | head(nets)
    arch = nets.arch
    if nets.integer:
        encoder, arch = _encoder(run, log)
        arrays = {k: v for k, v in arrays.items() if not k.startswith(f"{ANALYSIS}.")} | encoder
    return _save(run, arrays, arch, log)


def write_adapted(run: Run, base: ModelInfo, log: Log) -> ModelInfo:
    """Write a base model with what was trained, semantic head or analysis: its decoder, so its payloads, stay."""
    made: Arrays = {}
    arch = run.nets.arch
    replaced: tuple[str, ...] = ()
    if run.tiles:
        _finish_head(run, log)
        made |= head(run.nets)
        replaced += (f"{HEAD}.",)
    if run.settings.trains_encoder:
        encoder, arch = _encoder(run, log)
        made |= encoder
        replaced += (f"{ANALYSIS}.",)
    kept = {k: v for k, v in load_arrays(base).items() if not k.startswith(replaced)}
    return _save(run, kept | made, arch, log, base.vocabulary)


def _encoder(run: Run, log: Log) -> tuple[Arrays, Architecture]:
    """Tensors of the analysis, as integers, and the architecture with the blocks that are left of it."""
    analysis, arch = run.nets.eval().analysis, run.nets.arch

    def run_analysis() -> None:
        for x, q in run.calibration(IDLE_BATCHES):
            analysis(x, q)

    tensors, counts = export_network(analysis), []
    for at, idle in idle_blocks(analysis, run_analysis).items():
        tensors, count = fold_blocks(tensors, at, idle)
        counts.append(count)
    if counts != list(arch.analysis_blocks):
        log.say(f"analysis: {counts[0]} and {counts[1]} blocks at 1/8 and 1/16 do something; the others are left out")
    arrays = {f"{ANALYSIS}.{k}": v.numpy() for k, v in tensors.items()}
    return arrays, replace(arch, analysis_blocks=(counts[0], counts[1]))


def _finish_head(run: Run, log: Log) -> None:
    """Make the head integers, and say what that costs on held-out tiles."""
    nets, tiles = run.nets, run.tiles
    if not nets.stores_integers:
        return
    quality = QUALITIES[1]
    before = accuracy(run, nets, quality, True) if tiles else 0.0
    integer_head(run)
    if tiles:
        log.say(
            f"integer head: {accuracy(run, nets, quality, True):.4f} top-1 at quality {quality:g}, {before:.4f} before"
        )


def _save(run: Run, arrays: Arrays, arch: Sizes, log: Log, vocabulary: Vocabulary = NO_WORDS) -> ModelInfo:
    """Write the file; the vocabulary is that of the labelled images, if there are any.

    Broader names that a base model has for classes that all stay are kept unless others are given.
    """
    s, tiles = run.settings, run.tiles
    if tiles:
        parents = {k: tuple(v) for k, v in s.parents.items()} or vocabulary.parents_among(tiles.classes)
        vocabulary = Vocabulary(tuple(tiles.classes), parents)
    info = save_model(s.out, s.name, arrays, arch.to_json(), vocabulary, {"run": s.public()})
    log.write()
    if s.plot:
        log.plot()
    log.say(f"{s.out}: decoder {info.decoder[:16]}, head {info.head[:16]}, {Path(s.out).stat().st_size} bytes")
    return info


def transforms(nets: Networks) -> Arrays:
    """Tensors of both transforms and the gains by their names in a model file."""
    if not nets.integer:
        parts = (nets.analysis, ANALYSIS), (nets.gains, GAINS), (nets.synthesis, SYNTHESIS)
        return {k: v for network, prefix in parts for k, v in weights(network, prefix).items()}
    exported = {ANALYSIS: export_network(nets.analysis), SYNTHESIS: export_network(nets.synthesis)}
    exported[GAINS] = export_gains(nets.gains)
    return {f"{prefix}.{k}": v.numpy() for prefix, tensors in exported.items() for k, v in tensors.items()}


def head(nets: Networks) -> Arrays:
    """Tensors of the semantic head by their names in a model file."""
    if not nets.stores_integers:
        return weights(nets.head, HEAD)
    return {f"{HEAD}.{k}": v.numpy() for k, v in export_network(nets.head).items()}


def weights(network: nn.Module, prefix: str) -> Arrays:
    """Float tensors of a network; half precision, whose rounding lies far below that of the latents."""
    return {f"{prefix}.{k}": v.half().cpu().numpy() for k, v in network.state_dict().items()}


def samples(data: tuple[Tensor, Tensor], count: int) -> list[Sample]:
    """Symbols (1,h,w,C) and quality of each of the first crops."""
    nhwc = data[0][:count].permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [(nhwc[i : i + 1], float(data[1][i])) for i in range(len(nhwc))]


@torch.no_grad()
def estimate(prior: Prior, symbols: Tensor, quality: Tensor, quantised: bool) -> float:
    """Mean bits per pixel that the prior's logistic masses promise."""
    bits = 0.0
    for i in range(0, len(symbols), 8):
        x, q = symbols[i : i + 8].float(), quality[i : i + 8]
        bits += float(prior.bits(x, *prior(x, q, quantised)).sum())
    return bits / (symbols.shape[0] * 256 * symbols.shape[2] * symbols.shape[3])
