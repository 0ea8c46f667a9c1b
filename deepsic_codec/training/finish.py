"""From trained networks to a model file: integer prior, the coder's tables, weights, vocabulary."""

from pathlib import Path

import torch
from torch import nn

from deepsic_codec.model.exact.export import export_gains, export_network
from deepsic_codec.model.family import ANALYSIS, GAINS, HEAD, PRIOR, RDO, SYNTHESIS
from deepsic_codec.model.file import Arrays, ModelInfo, load_arrays, save_model
from deepsic_codec.model.quantise import make_tables
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.training.chooser import Chosen, bits_of
from deepsic_codec.training.log import Log
from deepsic_codec.training.loss import Networks
from deepsic_codec.training.measure import QUALITIES, accuracy
from deepsic_codec.training.phases import integer_head
from deepsic_codec.training.run import BATCH, Run
from deepsic_codec.training.tables import Sample, fit_tables, samples_of, total_bytes

#: Vocabulary of a model that was trained without labels.
NO_CLASSES = Vocabulary((), {})


def write_model(run: Run, log: Log) -> ModelInfo:
    """Fit the coder's tables to the trained networks and write the model file; reports the rate at each step."""
    s, nets = run.settings, run.nets
    _finish_head(run, log)
    log.say(f"integer prior: estimated {estimated_rate(run):.4f} bpp, on crops that it was not fitted to")
    exported, log_scales = nets.export_prior(), run.integer_prior.log_scales.double().cpu().numpy()
    prior = nets.integer_prior(exported, "cpu")
    samples = _samples(run, s.table_samples, s.seed + 4)
    checks = _samples(run, s.table_checks, s.seed + 5)
    pixels = sum(symbols.shape[1] * symbols.shape[2] * 256 for symbols, *_ in checks)
    start = CoderTables.untrained(nets.arch.latents, log_scales)
    log.say(f"coder, untrained tables: {total_bytes(prior, start, checks) * 8 / pixels:.4f} bpp")
    tables = fit_tables(prior, start, samples, checks)
    log.say(f"coder, fitted tables: {total_bytes(prior, tables, checks) * 8 / pixels:.4f} bpp")
    arrays: Arrays = {f"{PRIOR}.{k}": v.cpu().numpy() for k, v in exported.items()}
    arrays |= {f"decoder.coder.{k}": v for k, v in tables.arrays().items()}
    if nets.stores_integers:
        rates = make_tables(run.integer_prior.log_scales, export_gains(nets.gains)["step"])
        arrays |= {f"{RDO}.{name}": table.numpy() for name, table in rates.items()}
    return _save(run, arrays | transforms(nets) | head(nets), log)


def write_adapted(run: Run, base: ModelInfo, log: Log) -> ModelInfo:
    """Write a base model with the trained head, analysis or both. Its decoder stays, so its payloads stay readable."""
    trained: Arrays = {}
    if run.tiles:
        _finish_head(run, log)
        trained |= head(run.nets)
    if run.settings.trains_encoder:
        trained |= {k: v for k, v in transforms(run.nets).items() if k.startswith(f"{ANALYSIS}.")}
    return _save(run, load_arrays(base) | trained, log, base.vocabulary)


def _finish_head(run: Run, log: Log) -> None:
    """Bring the head into its integer form, and report the accuracy on held-out tiles before and after."""
    nets, quality = run.nets, QUALITIES[1]
    if not nets.stores_integers:
        return
    before = accuracy(run, nets, quality, True) if run.tiles else 0.0
    integer_head(run)
    if run.tiles:
        after = accuracy(run, nets, quality, True)
        log.say(f"integer head: {after:.4f} top-1 at quality {quality:g}, {before:.4f} before")


def _save(run: Run, arrays: Arrays, log: Log, vocabulary: Vocabulary = NO_CLASSES) -> ModelInfo:
    """Write the file. With labelled images, the vocabulary has their classes.

    Broader names come from the settings, or else from the base model if all their classes remain.
    """
    s, tiles = run.settings, run.tiles
    if tiles:
        parents = {k: tuple(v) for k, v in s.parents.items()} or vocabulary.parents_among(tiles.classes)
        vocabulary = Vocabulary(tuple(tiles.classes), parents)
    info = save_model(s.out, s.name, arrays, run.nets.arch.to_json(), vocabulary, {"run": s.public()})
    log.write()
    log.say(f"{s.out}: decoder {info.decoder[:16]}, head {info.head[:16]}, {Path(s.out).stat().st_size} bytes")
    return info


def transforms(nets: Networks) -> Arrays:
    """Return the tensors of both transforms and the gains by their names in a model file."""
    if not nets.integer:
        parts = (nets.analysis, ANALYSIS), (nets.gains, GAINS), (nets.synthesis, SYNTHESIS)
        return {k: v for network, prefix in parts for k, v in _weights(network, prefix).items()}
    exported = {ANALYSIS: export_network(nets.analysis), SYNTHESIS: export_network(nets.synthesis)}
    exported[GAINS] = export_gains(nets.gains)
    return {f"{prefix}.{k}": v.numpy() for prefix, tensors in exported.items() for k, v in tensors.items()}


def head(nets: Networks) -> Arrays:
    """Return the tensors of the semantic head by their names in a model file."""
    if not nets.stores_integers:
        return _weights(nets.head, HEAD)
    return {f"{HEAD}.{k}": v.numpy() for k, v in export_network(nets.head).items()}


def _weights(network: nn.Module, prefix: str) -> Arrays:
    """Return float weights in half precision, whose rounding is far below that of the latents."""
    return {f"{prefix}.{k}": v.half().cpu().numpy() for k, v in network.state_dict().items()}


def _samples(run: Run, count: int, seed: int) -> list[Sample]:
    """Return the symbols of random crops."""
    return samples_of(*run.collect_symbols(-(-count // BATCH), seed))[:count]


@torch.no_grad()
def estimated_rate(run: Run) -> float:
    """Return the mean rate in bits per pixel that the integer form of the prior estimates for fresh crops."""
    bits = 0.0
    chosen, quality = run.collect_symbols(max(2, run.settings.symbol_batches // 25), run.settings.seed + 2)
    for i in range(0, len(quality), 8):
        part = Chosen(*(column[i : i + 8] for column in chosen))
        bits += float(bits_of(run.nets.prior, part, quality[i : i + 8]).sum())
    return bits / (LATENT_STRIDE**2 * chosen.symbols[:, 0].numel())
