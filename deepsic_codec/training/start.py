"""The networks that a run begins with: fresh, from a model file, or from another run."""

import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.exact.export import restore_gains, restore_network, restore_prior
from deepsic_codec.model.families import architecture_from, family_of, load_checked
from deepsic_codec.model.family import ANALYSIS, GAINS, HEAD, PRIOR, SYNTHESIS, below, tensors_below
from deepsic_codec.model.file import Arrays, ModelInfo, read_info
from deepsic_codec.model.zoo import find_model
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.training import checkpoint
from deepsic_codec.training.data import LabelledTiles, Photographs
from deepsic_codec.training.grow import grow
from deepsic_codec.training.klt import linear_start
from deepsic_codec.training.loss import Networks
from deepsic_codec.training.paper import PaperNetworks, paper_start
from deepsic_codec.training.phases import FLOATING
from deepsic_codec.training.run import architecture_of, make_networks
from deepsic_codec.training.settings import Settings


def base_model(s: Settings) -> ModelInfo | None:
    """Return the model of `--from`, if any. Fails before any image is read, which may take long."""
    if not s.base:
        return None
    info = _model(s.base)
    if s.trains_encoder and not family_of(info.architecture).exact:
        raise ConfigurationError(
            f"--encoder-minutes: model {info.name!r} has networks in floating point, whose analysis transform cannot "
            "be trained alone; only labels can be adapted, with --labels and without --encoder-minutes"
        )
    return info


def starting_networks(
    s: Settings, base: ModelInfo | None, photos: Photographs | None, tiles: LabelledTiles | None, resumed: bool
) -> Networks:
    """Return the networks that a run begins with; of a resumed run, only their architecture counts."""
    if base is not None:
        nets = networks_of(base, len(tiles.classes if tiles else base.vocabulary.classes))
        nets.bounded = nets.integer
        return nets
    assert photos is not None
    arch = architecture_of(s, len(tiles.classes) if tiles else 0)
    if not s.start or resumed:
        nets = make_networks(arch)
        if not resumed:
            if isinstance(nets, PaperNetworks):
                paper_start(nets, photos, s.klt_crops)
            else:
                linear_start(nets, photos, s.klt_crops)
        return nets
    old = _networks_of_start(s)
    old.bounded |= old.integer  # trained within bounds: without them, errors of single images grow without limit
    if old.arch == arch:
        return old
    if not isinstance(arch, Architecture) or not isinstance(old.arch, Architecture):
        raise ConfigurationError(
            f"--start {s.start}: its networks have other sizes, not those of {s.architecture!r}, and only those of "
            "'base' grow; pass its --architecture, name another run, or leave out --start"
        )
    nets = make_networks(arch)
    old.integer, nets.bounded = False, old.bounded
    try:
        grow(nets, old, photos, s.klt_crops)
    except ConfigurationError as error:
        raise ConfigurationError(f"--start {s.start}: {error}") from None
    return nets


def load_networks(run: str | Path) -> Networks:
    """Return the averaged networks of a run's folder, in evaluation mode.

    Raises
    ------
    ConfigurationError
        If the folder holds no run, or its tensors do not fit its architecture.
    """
    run = Path(run)
    try:
        description = json.loads((run / "settings.json").read_text())
        arch = architecture_from(description["architecture"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{run}: not the folder of a run ({type(error).__name__}: {error})") from None
    state = checkpoint.load(run)
    if state is None:
        raise ConfigurationError(f"{run}: the run has no checkpoint")
    nets = make_networks(arch)
    load_state(nets, state.below("ema"), run)
    nets.integer = state.phase not in FLOATING and nets.stores_integers
    nets.bounded = bool(description.get("bounded"))
    return nets.eval()


def networks_of(info: ModelInfo, classes: int, option: str = "--from") -> Networks:
    """Return networks with the tensors of a model file; of its head, as far as it fits the number of classes.

    Tables over quality pass through fewer points than are stored, so latents may differ by their last bit.
    """
    _, arrays = load_checked(info)
    if info.values and classes == len(info.vocabulary.classes):  # the last layer stays, without its embedding
        arrays |= {name: arrays[name][: classes + 1] for name in arrays if name.startswith(f"{HEAD}.out.")}
    sizes = {"classes": classes + 1, **({"head_embedding": 0} if info.values else {})}  # some families have none
    try:
        nets = make_networks(architecture_from(info.architecture | sizes))
        _restore(nets, arrays)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{option} {info.path}: tensors do not fit its architecture ({error})") from None
    return nets


@torch.no_grad()
def _restore(nets: Networks, arrays: Arrays) -> None:
    """Load the tensors of a model file into networks."""
    stored = partial(tensors_below, arrays)
    nets.integer = nets.stores_integers
    if nets.stores_integers:
        restore_network(nets.analysis, stored(ANALYSIS))
        restore_network(nets.synthesis, stored(SYNTHESIS))
        restore_gains(nets.gains, stored(GAINS))
        restore_prior(nets.prior, stored(PRIOR))
        restore_network(nets.head, stored(HEAD))
        return
    for prefix, network in ((ANALYSIS, nets.analysis), (SYNTHESIS, nets.synthesis), (GAINS, nets.gains)):
        network.load_state_dict({k: v.float() for k, v in stored(prefix).items()})
    fresh = nets.head.state_dict()
    fitting = {k: v.float() for k, v in stored(HEAD).items() if k in fresh and fresh[k].shape == v.shape}
    nets.head.load_state_dict(fresh | fitting)  # the last layer is new where classes are others


def prior_of(info: ModelInfo) -> tuple[dict[str, Tensor], CoderTables]:
    """Return the integer prior and the coder's tables of a model file."""
    _, arrays = load_checked(info)
    return tensors_below(arrays, PRIOR), CoderTables.from_arrays(below(arrays, "decoder.coder"))


def load_state(nets: Networks, tensors: dict[str, Tensor], source: Path) -> None:
    """Load weights into networks; raises ConfigurationError, which names `source`, if they do not fit."""
    try:
        nets.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigurationError(f"{source}: tensors do not fit the architecture: {error}") from None


def _networks_of_start(s: Settings) -> Networks:
    """Return the networks of `--start`: a run's folder, or the name or file of a model."""
    if Path(s.start).is_dir():
        return load_networks(s.start)
    info = _model(s.start)
    if not family_of(info.architecture).exact:
        raise ConfigurationError(
            f"--start {s.start}: model {info.name!r} has networks in floating point, whose files do not "
            "hold the prior that training continues with; name the folder of its run"
        )
    return networks_of(info, len(info.vocabulary.classes), "--start").eval()


def _model(name: str) -> ModelInfo:
    return read_info(name) if Path(name).is_file() else find_model(name)
