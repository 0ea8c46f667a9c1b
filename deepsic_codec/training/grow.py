"""Start from smaller networks: more latents, more blocks, the rest as it was trained.

What is new says nothing at first, except the added latents: they take the directions in which
the smaller codec leaves most of the image behind, so that high qualities gain at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.prior import StepNetwork
from deepsic_codec.model.schedule import Step
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.training.data import Photographs
from deepsic_codec.training.klt import start_scales
from deepsic_codec.training.loss import Networks

#: Images per call, and their edge; the share of the mean variance that steadies the regression.
BATCH, EDGE, RIDGE = 8, 256, 1e-4
#: Sizes that may differ: latents and prior groups grow, blocks come and (if they do nothing) go, the semantic head is
#: new where its width is another, and its last layer for other classes.
FLEXIBLE = {
    "latents",
    "prior_groups",
    "prior_detail",
    "analysis_blocks",
    "synthesis_blocks",
    "head_blocks",
    "head_width",
    "classes",
}


@torch.no_grad()
def grow(nets: Networks, old: Networks, photos: Photographs, crops: int) -> None:
    """Give networks in float form the weights of smaller ones.

    Blocks of the analysis at 1/16 that the new architecture has no place for are left out, and
    what they add to every image alike is kept.

    Parameters
    ----------
    nets : Networks
        Just made; their own weights stay where the old ones have none.
    old : Networks
        Trained, in float form.
    photos : Photographs
        What the added latents are fitted to.
    crops : int
        So many crops of them.

    Raises
    ------
    ConfigurationError
        If the architectures are no larger and smaller version of each other.
    """
    _check(nets.arch, old.arch)
    before = old.arch.latents
    for parameter, known in _pairs(nets, old):
        parameter[tuple(slice(n) for n in known.shape)] = known.to(parameter)
    _contexts(nets, old)
    _blocks(nets, old)
    analysis, synthesis = nets.analysis, nets.synthesis
    synthesis.stem.weight[:, before:] = 0
    if nets.arch.head_width == old.arch.head_width:
        nets.head.stem.weight[:, before:] = 0
    analysis.out.weight[before:] = 0
    analysis.out.bias[before:] = 0
    if nets.arch.latents > before:
        forward, backward, variances = residual_transform(old, photos, nets.arch.latents - before, crops)
        analysis.linear.weight[before:] = forward[:, :, None, None]
        synthesis.linear.weight[:, before:] = backward[:, :, None, None]
        synthesis.input_scale[before:] = variances.clamp(min=1e-4).rsqrt()
        start_scales(nets.prior, variances, before)


def residual_transform(old: Networks, photos: Photographs, count: int, crops: int) -> tuple[Tensor, Tensor, Tensor]:
    """Linear maps for what networks leave behind at the highest quality.

    Returns
    -------
    forward : Tensor (count, 768)
        From blocks of images to the main components of what is left of them.
    backward : Tensor (768, count)
        Those components, orthonormal.
    variances : Tensor (count,)
        Of what ``forward`` gives, in units of 64 grey levels.
    """
    size = 3 * LATENT_STRIDE**2
    left, cross, whole = (torch.zeros(size, size, dtype=torch.float64) for _ in range(3))
    old, rng, seen = old.eval(), np.random.default_rng(0), 0
    edge = min(EDGE, int(photos.pool.shortest.min()) // LATENT_STRIDE * LATENT_STRIDE)
    for _ in range(max(1, -(-crops // BATCH))):
        x = photos.crops(BATCH, edge, rng).cpu()  # where networks are made
        quality = torch.full((len(x),), 100.0, device=x.device)
        rest = (x - old.synthesis(old.analysis(x, quality), quality)) / 64
        r, b = (_rows(t) for t in (rest, (x - 128) / 64))
        left, cross, whole, seen = left + r.T @ r, cross + r.T @ b, whole + b.T @ b, seen + len(r)
    vectors = torch.linalg.eigh(left)[1].flip(1)[:, :count]
    whole = whole + torch.eye(size, dtype=torch.float64) * (RIDGE * whole.diagonal().mean())
    forward = torch.linalg.solve(whole, (vectors.T @ cross).T).T
    variances = (forward @ whole * forward).sum(1) / seen
    return forward.float(), vectors.float(), variances.float()


def _rows(x: Tensor) -> Tensor:
    """Images (B,3,H,W) -> their blocks (N,768), in pixel-unshuffle order."""
    return F.pixel_unshuffle(x, LATENT_STRIDE).permute(0, 2, 3, 1).reshape(-1, 3 * LATENT_STRIDE**2).cpu().double()


def _pairs(nets: Networks, old: Networks) -> list[tuple[Tensor, Tensor]]:
    """Tensors of both that have a name and a place in common, those of blocks apart."""
    own = nets.state_dict()
    known = {k: v for k, v in old.state_dict().items() if ".blocks" not in f".{k}" or k.startswith("head.")}
    known = {k: v for k, v in known.items() if not k.endswith(".first.weight")}
    known = {k: v for k, v in known.items() if not k.endswith(".direct") or k in own}  # contexts may see less
    if nets.arch.head_width != old.arch.head_width:
        return [(own[k], v) for k, v in known.items() if not k.startswith("head.")]
    for block in list(nets.head.blocks)[old.arch.head_blocks :]:
        nn.init.zeros_(block.down.weight)
        nn.init.zeros_(block.down.bias)
    if nets.arch.classes != old.arch.classes:
        known = {k: v for k, v in known.items() if not k.startswith("head.out.")}
    return [(own[k], v) for k, v in known.items()]


def _contexts(nets: Networks, old: Networks) -> None:
    """First layers of the prior: each column belongs to a feature, of which there may be others now."""
    for net, step, was, step_was in _shared_steps(nets, old):
        if not net.has_inputs:
            continue
        place = {name: i for i, name in enumerate(step_was.input_names())}
        found = [(i, place[name]) for i, name in enumerate(step.input_names()) if name in place]
        new, known = (torch.tensor(column) for column in zip(*found, strict=True))
        net.first.weight.zero_()
        net.first.weight[:, new] = was.first.weight[:, known].to(net.first.weight)


def _shared_steps(nets: Networks, old: Networks) -> Iterator[tuple[StepNetwork, Step, StepNetwork, Step]]:
    """Steps that both priors have, the new and the old."""
    new, known = (list(zip(prior.networks, prior.steps, strict=True)) for prior in (nets.prior, old.prior))
    for (net, step), (was, before) in zip(new, known, strict=False):
        yield net, step, was, before  # type: ignore[misc]


def _blocks(nets: Networks, old: Networks) -> None:
    for new, was in ((nets.analysis, old.analysis), (nets.synthesis, old.synthesis)):
        for name in ("blocks8", "blocks16"):
            blocks, known = getattr(new, name), getattr(was, name)
            for i, block in enumerate(blocks):
                if i < len(known):
                    block.load_state_dict(block.state_dict() | known[i].state_dict())
                else:
                    nn.init.zeros_(block.down.weight)
                    nn.init.zeros_(block.down.bias)
    analysis = nets.analysis
    for block in list(old.analysis.blocks16)[len(analysis.blocks16) :]:
        # where nothing gets through its ReLU, a block adds its last bias
        analysis.out.bias += analysis.out.weight[:, :, 0, 0] @ block.down.bias


def _check(new: Architecture, old: Architecture) -> None:
    """Raise ConfigurationError unless one is a larger version of the other."""
    a, b = new.to_json(), old.to_json()
    other = [f"{k} {a[k]}, not {b[k]}" for k in a if k not in FLEXIBLE and a[k] != b[k]]
    groups = old.prior_groups
    if new.prior_groups[: len(groups)] != groups:
        other.append(f"prior groups {list(new.prior_groups)} do not begin with {list(groups)}")
    fewer = ["analysis_blocks"] if new.analysis_blocks[0] < old.analysis_blocks[0] else []
    if any(m < n for m, n in zip(new.synthesis_blocks, old.synthesis_blocks, strict=True)):
        fewer.append("synthesis_blocks")
    if new.head_blocks < old.head_blocks and new.head_width == old.head_width:
        fewer.append("head_blocks")
    for k in fewer:
        more, less = ([*n] if isinstance(n, tuple) else n for n in (getattr(old, k), getattr(new, k)))
        other.append(f"{k} {less} are fewer than {more}")
    if other:
        raise ConfigurationError(f"cannot start from these networks: {'; '.join(other)}")
