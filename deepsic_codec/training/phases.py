"""The phases of a run: what each trains, and one step of it.

1. `joint`: all networks, on rate, distortion and semantics together.
2. `integer`: the same, with transforms that imitate their integer form.
3. `prior`: the prior alone, imitating its integer form, on symbols that the encoder chose with the prior from before.
4. `synthesis`: the synthesis alone, on symbols that the encoder chooses with the trained prior.
5. `head`: the semantic head alone, on latents of fresh crops, half of them as chunks store them.

With `--from`, the decoder of a model file stays. Then `encoder` and `integer` train the analysis and the head in the
way of `joint` and `integer`, and `head` follows. The coder's tables and the model file come last (`finish.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepsic_codec.model.networks import step_lambda
from deepsic_codec.payload.constants import LATENT_STRIDE, quality_step
from deepsic_codec.training.balance import MAX_FACTOR, balance, balance_head
from deepsic_codec.training.chooser import Chosen, bits_of
from deepsic_codec.training.graphs import Graphs
from deepsic_codec.training.loss import FILTER_FACTOR, Terms, cell_logits, semantic
from deepsic_codec.training.run import BATCH, Run

#: Phases whose transforms do not imitate their integer form.
FLOATING = ("joint", "encoder")
#: Batches that the ranges of the transforms are measured on.
CALIBRATION = 8

Measures = dict[str, Tensor]
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Phase:
    """A phase of a run, ready to be trained.

    Attributes
    ----------
    name : str
    groups : list of dict
        Parameters to train, as the optimiser takes them, each with the `factor` of its learning rate.
    step : callable
        Takes the number of the step and the generator of the data. Adds to the gradients and returns the measures.
    steps, minutes, lr
        Budget, which ends with either, and the largest learning rate.
    images : int
        Images per step, for the speed in the log.
    saved : dict of str to Tensor
        Tensors that a checkpoint needs beside networks and optimiser.
    """

    name: str
    groups: Groups
    step: Callable[[int, np.random.Generator], Measures]
    steps: int
    minutes: float
    lr: float
    images: int
    saved: dict[str, Tensor] = field(default_factory=dict)


def planned(run: Run) -> list[str]:
    """Return the names of the phases that the settings ask for, in their order."""
    s, names = run.settings, []
    if s.base and s.trains_encoder:
        names += ["encoder", "integer"]
    if not s.base:
        names += ["joint"] if s.minutes and s.steps else []
        # without a budget, it only brings the transforms into their integer form
        names += ["integer"] if run.nets.stores_integers else []
        names += ["prior"] if s.prior_minutes and s.prior_steps else []
        names += ["synthesis"] if s.synthesis_minutes and s.synthesis_steps else []
    return names + (["head"] if run.tiles and s.head_minutes and s.head_steps else [])


def joint(run: Run) -> Phase:
    """Train all networks in floating point."""
    s, nets = run.settings, run.nets.train()
    nets.integer = False
    return _joint_phase(run, "joint", s.steps, s.minutes, s.lr)


def encoder(run: Run) -> Phase:
    """Train the analysis in floating point, for the decoder of a model file."""
    s, nets = run.settings, run.nets.train()
    nets.integer, nets.bounded = False, True
    return _joint_phase(run, "encoder", s.encoder_steps, s.encoder_minutes, s.encoder_learning_rate)


def integer(run: Run) -> Phase:
    """Bring the transforms into the ranges of their integer form, and train on with its arithmetic."""
    s, nets = run.settings, run.nets.eval()
    if not nets.integer:
        transforms = [nets.analysis, nets.synthesis][: 1 if s.base else 2]
        balance(transforms, partial(_run_transforms, run), max_factor=1.0 if nets.bounded else MAX_FACTOR)
        nets.integer = True
    nets.train()
    return _joint_phase(run, "integer", s.integer_steps, s.integer_minutes, s.integer_learning_rate)


def prior(run: Run) -> Phase:
    """Train the prior in its integer form; every quality has the same weight."""
    s, net = run.settings, run.nets.prior
    chosen, quality = run.symbols
    net.train()

    def step(number: int, rng: np.random.Generator) -> Measures:
        pick = torch.from_numpy(rng.integers(len(quality), size=run.share.prior_batch)).to(run.device)
        part = Chosen(*(column[pick] for column in chosen))
        pixels = LATENT_STRIDE**2 * part.symbols.shape[2] * part.symbols.shape[3]
        bits = bits_of(net, part, quality[pick]) / pixels
        loss = (bits / (bits.detach() + 0.05)).mean()
        loss.backward()
        return {"loss": loss.detach(), "bpp": bits.mean().detach()}

    groups = [{"params": list(net.parameters()), "factor": 1.0}]
    budget = s.prior_steps, s.prior_minutes, s.prior_learning_rate
    return Phase("prior", groups, step, *budget, s.prior_batch, run.prior_before)


def synthesis(run: Run) -> Phase:
    """Train the synthesis on symbols that the encoder chooses with the trained prior."""
    s, nets = run.settings, run.nets.eval()

    def step(number: int, rng: np.random.Generator) -> Measures:
        count = run.share.photos_per_step
        mosaics = run.tiles is not None and number % 4 == 3
        x = run.images(max(1, count // 2) if mosaics else count, rng, mosaics, edge=4)
        q = run.qualities(len(x))
        with torch.no_grad():
            latents = run.chooser.stored(nets.analysis(x, q), q)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=s.bf16):
            decoded = nets.synthesis(latents, q)
        error = (decoded - x).square().mean((1, 2, 3))
        loss = (quality_step(q) / 20 * step_lambda(q) * error).mean()
        loss.backward()
        return {"loss": loss.detach(), "mse": error.mean().detach()}

    of_filter = list(nets.synthesis.filter.parameters()) if nets.stores_integers else []
    others = [p for p in nets.synthesis.parameters() if all(p is not q for q in of_filter)]
    groups = [{"params": others, "factor": 1.0}, {"params": of_filter, "factor": FILTER_FACTOR}]
    budget = s.synthesis_steps, s.synthesis_minutes, s.synthesis_learning_rate
    return Phase("synthesis", groups, step, *budget, s.photos_per_step)


def head(run: Run) -> Phase:
    """Train the semantic head in floating point; once balanced, rounding costs it next to nothing."""
    s, net = run.settings, run.nets.head
    run.nets.eval()
    net.train()

    def step(number: int, rng: np.random.Generator) -> Measures:
        latents, labels, quality = run.cells(run.share.head_batch, rng)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=s.bf16):
            logits = net(latents, quality).float()
        loss = semantic(logits, labels)
        loss.backward()
        known = labels < net.out.out_features - 1
        right = (logits.argmax(1) == labels) & known
        return {"loss": loss.detach(), "accuracy": right.sum() / known.sum().clamp(min=1)}

    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "factor": 1.0, "weight_decay": s.head_weight_decay},
        {"params": vectors, "factor": 1.0},
    ]
    return Phase("head", groups, step, s.head_steps, s.head_minutes, s.head_learning_rate, s.head_batch)


#: What makes each phase when its turn comes.
PHASES: dict[str, Callable[[Run], Phase]] = {
    "joint": joint,
    "encoder": encoder,
    "integer": integer,
    "prior": prior,
    "synthesis": synthesis,
    "head": head,
}


def _joint_phase(run: Run, name: str, steps: int, minutes: float, lr: float) -> Phase:
    """Return a phase that trains with the joint loss."""
    s, groups = run.settings, _joint_groups(run)
    gradients: Callable[..., Measures] = partial(joint_gradients, run)
    if run.device.startswith("cuda"):
        gradients = Graphs(gradients, [p for group in groups for p in group["params"]])
    images = s.photos_per_step + (s.mosaics_per_step if run.tiles else 0)
    return Phase(name, groups, lambda number, rng: gradients(*_draw(run, number, rng)), steps, minutes, lr, images)


def _joint_groups(run: Run) -> Groups:
    """Return the parameters that the joint loss trains: all, or those of the encoder and the head."""
    nets = run.nets
    if not run.settings.base:
        return nets.groups()
    trained = [nets.analysis, nets.head] if run.tiles else [nets.analysis]
    kept = {id(p) for network in trained for p in network.parameters()}
    groups = [g | {"params": [p for p in g["params"] if id(p) in kept]} for g in nets.groups()]
    return [g for g in groups if g["params"]]


def _draw(run: Run, number: int, rng: np.random.Generator) -> list[Tensor]:
    """Draw the images of a joint step: photographs and qualities, then mosaics, labels and qualities."""
    s = run.share
    assert run.photos is not None
    images = [run.photos.crops(s.photos_per_step, s.crop, rng), run.qualities(s.photos_per_step)]
    if run.tiles:
        # labelled cells are single in one step and parts of a larger image in the next
        count, edge = (s.mosaics_per_step, 4) if number % 2 else (16 * s.mosaics_per_step, 1)
        images += [*run.tiles.mosaics(count, edge, rng, s.jitter), run.qualities(count)]
    return images


def joint_gradients(
    run: Run,
    photos: Tensor,
    quality: Tensor,
    tiles: Tensor | None = None,
    labels: Tensor | None = None,
    tiles_quality: Tensor | None = None,
) -> Measures:
    """Add the gradients of the joint loss.

    Parameters
    ----------
    run : Run
    photos : Tensor (B,3,H,W)
        Unlabelled images, 0 to 255.
    quality : Tensor (B,)
    tiles : Tensor (M,3,H,W), optional
        Labelled images.
    labels : Tensor (M,rows,columns), optional
        Class of each of their cells.
    tiles_quality : Tensor (M,), optional

    Returns
    -------
    dict of str to Tensor
        The loss and its terms.
    """
    # with --from, the prior is that of the model file: integers
    nets, bf16, quantised = run.nets, run.share.bf16, bool(run.settings.base)
    if tiles is None or tiles_quality is None:
        return backward(run, [(nets.terms(photos, quality, bf16, quantised), quality, None)])
    if tiles.shape[1:] == photos.shape[1:]:  # one batch of both: fewer and larger operations
        both = torch.cat([quality, tiles_quality])
        terms = nets.terms(torch.cat([photos, tiles]), both, bf16, quantised)
        of_photos, of_tiles = terms.slice(slice(len(photos))), terms.slice(slice(len(photos), None))
        return backward(run, [(of_photos, quality, None), (of_tiles, tiles_quality, labels)])
    first = backward(run, [(nets.terms(photos, quality, bf16, quantised), quality, None)])
    second = backward(run, [(nets.terms(tiles, tiles_quality, bf16, quantised), tiles_quality, labels)])
    return first | second | {"loss": first["loss"] + second["loss"]}


def backward(run: Run, parts: list[tuple[Terms, Tensor, Tensor | None]]) -> Measures:
    """Add the gradients of the loss of photographs, and of tiles, which have labels.

    Parameters
    ----------
    run : Run
    parts : list of (Terms, Tensor, Tensor or None)
        Terms, qualities and labels of one kind of image each.
    """
    s, nets = run.share, run.nets
    measures: Measures = {}
    total = torch.zeros((), device=run.device)
    for terms, quality, labels in parts:
        loss = (1.0 if not run.tiles else 0.75 if labels is None else 0.25) * nets.loss(terms, quality)
        if run.tiles:
            unknown = torch.full(terms.logits.shape[:3], nets.arch.classes - 1, device=run.device)
            targets, weight = (unknown, 0.3) if labels is None else (labels, 1.0)
            loss = loss + s.semantic_weight * weight * semantic(terms.logits, targets)
        total = total + loss
        prefix = "" if labels is None else "tiles_"
        measures |= {f"{prefix}bpp": terms.rate.mean(), f"{prefix}mse": terms.distortion.mean()}
        if labels is not None:
            measures["accuracy"] = (terms.logits.argmax(-1) == labels).float().mean()
    total.backward()
    return {name: value.detach() for name, value in ({"loss": total} | measures).items()}


@torch.no_grad()
def _run_transforms(run: Run) -> None:
    """Run both transforms on training images at all qualities."""
    nets, rng = run.nets, np.random.default_rng(run.settings.seed + 6)
    for batch in range(CALIBRATION):
        x = run.images(BATCH, rng, mosaics=batch % 4 == 3, edge=2)
        q = run.stored_qualities(BATCH, rng)
        gain = nets.gains(q)
        nets.synthesis(torch.round(nets.analysis(x, q) * gain) / gain, q)


@torch.no_grad()
def integer_head(run: Run) -> None:
    """Bring the semantic head into its integer form."""
    nets = run.nets.eval()

    def run_head() -> None:
        rng = np.random.default_rng(run.settings.seed + 7)
        for batch in range(4 * CALIBRATION):
            x = run.images(BATCH, rng, mosaics=batch % 4 > 0 or not run.photos, edge=4)
            q = run.stored_qualities(BATCH, rng)
            cell_logits(nets.head, nets.analysis(x, q), q)

    if nets.stores_integers and not nets.head.integer:
        balance_head(nets.head, run_head)
        nets.head.integer = True
