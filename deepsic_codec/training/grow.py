"""Start from smaller networks: more latents, more blocks, the rest as it was trained.

Additions change nothing at first, except the added latents: they take the directions in which the smaller codec leaves
most of the image behind, so that high qualities gain at once.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.networks import Block
from deepsic_codec.model.prior import StepNetwork
from deepsic_codec.model.schedule import Step
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.training.balance import bias_of
from deepsic_codec.training.data import Photographs
from deepsic_codec.training.klt import BLOCK, block_rows, start_scales
from deepsic_codec.training.loss import Networks

#: Images per call and their edge in pixels.
BATCH, EDGE = 8, 256
#: Share of the mean variance that is added to all variances, so that the regression is stable.
RIDGE = 1e-4
#: Sizes that may differ. A semantic head of another width is new, and so is its last layer for other classes.
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
    """Give networks the weights of smaller ones.

    Blocks of the analysis at 1/16 for which the new architecture has no room are left out; the constant that an idle
    block adds is kept.

    Parameters
    ----------
    nets : Networks
        New networks in float form. Weights that the smaller ones lack stay as they are.
    old : Networks
        Trained networks in float form.
    photos : Photographs
        Images that the added latents are fitted to.
    crops : int
        Number of crops for this.

    Raises
    ------
    ConfigurationError
        If one architecture is not a larger version of the other.
    """
    _check(nets.arch, old.arch)
    before = old.arch.latents
    for parameter, value in _shared_tensors(nets, old):
        parameter[tuple(slice(n) for n in value.shape)] = value.to(parameter)
    _copy_contexts(nets, old)
    _copy_blocks(nets, old)
    analysis, synthesis = nets.analysis, nets.synthesis
    synthesis.stem.weight[:, before:] = 0
    if nets.arch.head_width == old.arch.head_width:
        nets.head.stem.weight[:, before:] = 0
    analysis.out.weight[before:] = 0
    bias_of(analysis.out)[before:] = 0
    if nets.arch.latents > before:
        forward, backward, variances = residual_transform(old, photos, nets.arch.latents - before, crops)
        analysis.linear.weight[before:] = forward[:, :, None, None]
        synthesis.linear.weight[:, before:] = backward[:, :, None, None]
        synthesis.input_scale[before:] = variances.clamp(min=1e-4).rsqrt()
        start_scales(nets.prior, variances, before)


def residual_transform(old: Networks, photos: Photographs, count: int, crops: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return linear maps for the error that networks leave at quality 100.

    Returns
    -------
    forward : Tensor (count,768)
        From blocks of images to the principal components of their error.
    backward : Tensor (768,count)
        These components, orthonormal.
    variances : Tensor (count,)
        Of the results of `forward`, in units of 64 grey levels.
    """
    error_squares, cross, block_squares = (torch.zeros(BLOCK, BLOCK, dtype=torch.float64) for _ in range(3))
    old, rng, total = old.eval(), np.random.default_rng(0), 0
    edge = min(EDGE, int(photos.pool.shortest.min()) // LATENT_STRIDE * LATENT_STRIDE)
    for _ in range(max(1, -(-crops // BATCH))):
        x = photos.crops(BATCH, edge, rng).cpu()  # new networks are on the CPU
        quality = torch.full((len(x),), 100.0)
        errors = block_rows((x - old.synthesis(old.analysis(x, quality), quality)) / 64)
        blocks = block_rows((x - 128) / 64)
        error_squares += errors.T @ errors
        cross += errors.T @ blocks
        block_squares += blocks.T @ blocks
        total += len(errors)
    backward = torch.linalg.eigh(error_squares)[1].flip(1)[:, :count]
    block_squares += torch.eye(BLOCK, dtype=torch.float64) * (RIDGE * block_squares.diagonal().mean())
    forward = torch.linalg.solve(block_squares, (backward.T @ cross).T).T
    variances = (forward @ block_squares * forward).sum(1) / total
    return forward.float(), backward.float(), variances.float()


def _shared_tensors(nets: Networks, old: Networks) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors with the same name and meaning in both, apart from the transforms' blocks."""
    new, trained = nets.state_dict(), old.state_dict()
    names = [name for name in trained if name.startswith("head.") or ".blocks" not in name]
    names = [name for name in names if not name.endswith(".first.weight")]  # see _copy_contexts
    names = [name for name in names if name in new or not name.endswith(".direct")]  # steps may have fewer inputs
    if nets.arch.head_width != old.arch.head_width:
        names = [name for name in names if not name.startswith("head.")]
    else:
        for block in list(nets.head.blocks)[old.arch.head_blocks :]:
            _silence(block)
        if nets.arch.classes != old.arch.classes:
            names = [name for name in names if not name.startswith("head.out.")]
    return [(new[name], trained[name]) for name in names]


def _copy_contexts(nets: Networks, old: Networks) -> None:
    """Copy the first layers of the prior: each column belongs to an input, and the inputs may be others."""
    for network, step, old_network, old_step in _shared_steps(nets, old):
        if not network.has_inputs:
            continue
        columns = {name: i for i, name in enumerate(old_step.input_names())}
        pairs = [(i, columns[name]) for i, name in enumerate(step.input_names()) if name in columns]
        new, known = (torch.tensor(column) for column in zip(*pairs, strict=True))
        network.first.weight.zero_()
        network.first.weight[:, new] = old_network.first.weight[:, known].to(network.first.weight)


def _shared_steps(nets: Networks, old: Networks) -> Iterator[tuple[StepNetwork, Step, StepNetwork, Step]]:
    """Yield the steps that both priors have."""
    new, trained = (list(zip(prior.networks, prior.steps, strict=True)) for prior in (nets.prior, old.prior))
    for (network, step), (old_network, old_step) in zip(new, trained, strict=False):
        assert isinstance(network, StepNetwork) and isinstance(old_network, StepNetwork)
        yield network, step, old_network, old_step


def _copy_blocks(nets: Networks, old: Networks) -> None:
    for transform, old_transform in ((nets.analysis, old.analysis), (nets.synthesis, old.synthesis)):
        for name in ("blocks8", "blocks16"):
            blocks, trained = getattr(transform, name), getattr(old_transform, name)
            for i, block in enumerate(blocks):
                if i < len(trained):
                    block.load_state_dict(block.state_dict() | trained[i].state_dict())
                else:
                    _silence(block)
    out = nets.analysis.out
    for block in list(old.analysis.blocks16)[len(nets.analysis.blocks16) :]:
        assert isinstance(block, Block)  # an idle one adds its last bias
        bias_of(out).add_(out.weight[:, :, 0, 0] @ bias_of(block.down))


def _silence(block: nn.Module) -> None:
    """Let a block add nothing."""
    assert isinstance(block, Block)
    nn.init.zeros_(block.down.weight)
    nn.init.zeros_(bias_of(block.down))


def _check(new: Architecture, old: Architecture) -> None:
    """Raise ConfigurationError unless `new` is a larger version of `old`."""
    a, b = new.to_json(), old.to_json()
    problems = [f"{k} {a[k]}, not {b[k]}" for k in a if k not in FLEXIBLE and a[k] != b[k]]
    groups = old.prior_groups
    if new.prior_groups[: len(groups)] != groups:
        problems.append(f"prior groups {list(new.prior_groups)} do not begin with {list(groups)}")
    fewer = ["analysis_blocks"] if new.analysis_blocks[0] < old.analysis_blocks[0] else []
    if any(m < n for m, n in zip(new.synthesis_blocks, old.synthesis_blocks, strict=True)):
        fewer.append("synthesis_blocks")
    if new.head_blocks < old.head_blocks and new.head_width == old.head_width:
        fewer.append("head_blocks")
    problems += [f"{k} {a[k]} are fewer than {b[k]}" for k in fewer]
    if problems:
        raise ConfigurationError(f"cannot start from these networks: {'; '.join(problems)}")
