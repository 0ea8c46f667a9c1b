"""Networks to go on training with, from the tensors of a model file."""

from functools import partial

import torch

from deepsic_codec.model.exact.export import restore_gains, restore_network, restore_prior
from deepsic_codec.model.family import ANALYSIS, GAINS, HEAD, PRIOR, SYNTHESIS, tensors_below
from deepsic_codec.model.file import Arrays
from deepsic_codec.training.loss import Networks


@torch.no_grad()
def restore(nets: Networks, arrays: Arrays) -> None:
    """Give networks the transforms of a model file and, as far as it fits their classes, its semantic head.

    Integer transforms come back as they are but for their tables over quality, which pass
    through fewer points than are stored: latents may differ by their last bit. With them
    comes the prior, whose float form the files of other models lack.

    Raises
    ------
    KeyError, RuntimeError, ValueError
        If the tensors do not fit the architecture.
    """
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
    own = nets.head.state_dict()
    fitting = {k: v.float() for k, v in stored(HEAD).items() if k in own and own[k].shape == v.shape}
    nets.head.load_state_dict(own | fitting)  # the last layer is new where classes are others
