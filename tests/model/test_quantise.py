"""The optimised quantiser: the same symbols however they are looked for, and never dearer ones."""

import numpy as np
import pytest
import torch

from deepsic_codec.model import quantise as rdo
from deepsic_codec.model.coding import predict
from deepsic_codec.model.exact.export import restore_prior
from deepsic_codec.model.exact.prior import IntegerPrior
from deepsic_codec.model.exact.transforms import IntegerTransforms
from deepsic_codec.model.families import architecture_from
from deepsic_codec.model.family import GAINS, PRIOR, RDO, tensors_below
from deepsic_codec.model.file import load_arrays
from deepsic_codec.model.ops.torch import TorchOps
from deepsic_codec.model.prior import Prior
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import drone_frame


@pytest.fixture(scope="module")
def parts():
    """Prior, tables, latents in steps and qualities of three crops."""
    info = find_model("base")
    arch, arrays = architecture_from(info.architecture), load_arrays(info)
    prior = IntegerPrior(arch, tensors_below(arrays, PRIOR))
    tables = rdo.load_tables(tensors_below(arrays, RDO), "cpu")
    frame, quality = drone_frame(), np.array([12.0, 50.0, 88.0])
    crops = np.stack([frame[128 * i : 128 * i + 96, :144] for i in range(3)])
    scaled = IntegerTransforms(arch, arrays, torch.device("cpu")).analyse(torch.from_numpy(crops), quality).scaled
    return prior, tables, scaled, torch.from_numpy(quality).long()


@pytest.mark.parametrize("one", [False, True], ids=["quality of each", "one quality"])
def test_compiled_loop_and_tensors_agree(parts, monkeypatch, one):
    prior, tables, scaled, quality = parts
    quality = 50 if one else quality
    few, predictions = rdo.quantise(prior, tables, scaled, quality)
    monkeypatch.setattr(prior, "ops", TorchOps())
    again, others = rdo.quantise(prior, tables, scaled, quality)
    assert torch.equal(again, few)
    for one, other in ((predictions, others), (predictions, predict(prior, few, quality))):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    nearest = torch.round(scaled).to(torch.int32)
    moved = few - nearest
    assert 0 < (moved != 0).float().mean() < 0.2 and moved.abs().max() == 1


def test_no_tables_mean_the_nearest(parts):
    prior, tables, scaled, quality = parts
    nearest = torch.round(scaled).to(torch.int32)
    actual, predictions = rdo.quantise(prior, None, scaled, quality)
    assert torch.equal(actual, nearest) and predictions is None


def test_tables_are_those_of_the_packaged_model():
    """Every quality from 1 to 100 has the prices of its own step."""
    info = find_model("base")
    arch, arrays = architecture_from(info.architecture), load_arrays(info)
    prior = Prior(arch)
    restore_prior(prior, tensors_below(arrays, PRIOR))
    made = rdo.make_tables(prior.log_scales, tensors_below(arrays, GAINS)["step"])
    stored = tensors_below(arrays, RDO)
    assert made.keys() == stored.keys()
    for name, table in made.items():
        assert table.dtype == stored[name].dtype and torch.equal(table, stored[name])


def test_symbols_do_not_depend_on_the_qualities_beside_them(parts):
    prior, tables, scaled, quality = parts
    together, _ = rdo.quantise(prior, tables, scaled, quality)
    for image, one in enumerate(quality.tolist()):
        alone, _ = rdo.quantise(prior, tables, scaled[image : image + 1], one)
        assert torch.equal(alone[0], together[image])
