"""What every registered family promises: shapes, payloads that come back, and exact decoding where it is claimed."""

import numpy as np
import pytest
import torch

from deepsic_codec.model.architecture import Architecture, Sizes
from deepsic_codec.model.coding import decode_symbols, encode_symbols
from deepsic_codec.model.exact.export import export_gains, export_network, export_prior
from deepsic_codec.model.families import FAMILIES, architecture_from, family_of, register
from deepsic_codec.model.family import ANALYSIS, GAINS, HEAD, SYNTHESIS
from deepsic_codec.model.paper import PaperArchitecture
from deepsic_codec.model.paper_networks import ChannelPrior
from deepsic_codec.model.prior import Prior
from deepsic_codec.payload.coders.contexts import CoderTables
from tests.common import check_rejects

DEVICE = torch.device("cpu")
#: Small sizes of each family; a new family adds its own, and its prior below.
SMALL = {
    "deepsic": Architecture(
        latents=16,
        analysis_widths=(8, 16),
        analysis_blocks=(1, 1),
        synthesis_widths=(8, 16),
        synthesis_blocks=(1, 1),
        prior_groups=(4, 12),
        prior_width=16,
        prior_detail=6,
        head_width=16,
        classes=4,
        knots=3,
    ),
    "paper": PaperArchitecture(1.0, (4, 2, 1, 1), filters=4, head_width=4, classes=4),
}
#: Integer tensors of an untrained prior of each family.
PRIORS = {
    "deepsic": lambda arch: export_prior(Prior(arch)),
    "paper": lambda arch: ChannelPrior(arch).export(),
}


def exported(arch):
    """Arrays of a model file, and the prior's tensors, of untrained networks."""
    torch.manual_seed(0)
    networks = family_of(arch).networks(arch)
    names = {"analysis": ANALYSIS, "gains": GAINS, "synthesis": SYNTHESIS, "head": HEAD}
    if arch.family == "deepsic":
        tensors = {n: export_gains(m) if n == "gains" else export_network(m) for n, m in networks.items()}
    else:
        tensors = {name: network.state_dict() for name, network in networks.items()}
    arrays = {f"{names[n]}.{k}": v.numpy() for n, part in tensors.items() for k, v in part.items()}
    return arrays, PRIORS[arch.family](arch)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request):
    family, arch = FAMILIES[request.param], SMALL[request.param]
    arrays, prior = exported(arch)
    return family, arch, family.transforms(arch, arrays, DEVICE), family.prior(arch, prior, "cpu")


def images(seed=0, dtype=np.uint8):
    chance = np.random.default_rng(seed)
    return torch.from_numpy(chance.integers(0, 256, (2, 64, 48, 3)).astype(dtype) * (64 if dtype == np.int16 else 1))


QUALITY = np.array([20.0, 71.5])


def test_descriptions_come_back(loaded):
    family, arch, _, _ = loaded
    described = arch.to_json()
    assert described["family"] == arch.family and architecture_from(described) == arch
    assert isinstance(arch, Sizes) and family_of(described) is family_of(arch) is family
    for wrong in ({k: v for k, v in described.items() if k != "classes"}, described | {"more": 1}, {}):
        check_rejects(ValueError, "architecture", architecture_from, wrong)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_shapes(loaded, dtype):
    _, arch, transforms, _ = loaded
    analysed = transforms.analyse(images(dtype=dtype), QUALITY)
    assert analysed.scaled.shape == analysed.latents.shape == (2, 4, 3, arch.latents)
    assert analysed.scaled.dtype == torch.float32
    symbols = torch.round(analysed.scaled).to(torch.int16)
    pixels, exact = (transforms.synthesise(symbols, QUALITY, q6, False) for q6 in (False, True))
    assert pixels.shape == exact.shape == (2, 64, 48, 3)
    assert (pixels.dtype, exact.dtype) == (torch.uint8, torch.int16) and exact.min() >= 0 and exact.max() <= 255 * 64
    latents = transforms.latents(symbols.numpy(), QUALITY, False)
    assert latents.shape == analysed.latents.shape and latents.dtype == analysed.latents.dtype
    scores = transforms.score(latents[:, :, :3], QUALITY)
    assert scores.shape == (2, arch.classes) and scores.dtype == torch.uint8


def test_symbols_come_back_from_payloads(loaded):
    _, arch, transforms, prior = loaded
    symbols = torch.round(transforms.analyse(images(), QUALITY).scaled).to(torch.int16).numpy()
    assert prior.latents == arch.latents == sum(s.count for s in prior.steps if s.mask in ("A", "1"))
    tables = CoderTables.untrained(arch.latents, prior.log_scales.double().numpy())
    streams = encode_symbols(prior, tables, [symbols], [50.0])
    (again,) = decode_symbols(prior, tables, streams, 2, symbols.shape[1:3], [50.0])
    assert np.array_equal(again, symbols)


def test_what_is_claimed_to_be_exact_is(loaded):
    """Pixels do not depend on batches, threads or the precision of the process."""
    family, _, transforms, _ = loaded
    if not family.exact:
        pytest.skip("not claimed")
    symbols = torch.round(transforms.analyse(images(), QUALITY).scaled).to(torch.int16)
    pixels = transforms.synthesise(symbols, QUALITY, True, False)
    alone = torch.cat([transforms.synthesise(symbols[i : i + 1], QUALITY[i : i + 1], True, False) for i in range(2)])
    with torch.autocast("cpu", torch.bfloat16):
        other = transforms.synthesise(symbols, QUALITY, True, False)
    assert torch.equal(pixels, alone) and torch.equal(pixels, other)


def test_families_are_registered_once(monkeypatch):
    family = FAMILIES["paper"]
    check_rejects(ValueError, "already registered", register, family)
    monkeypatch.delitem(FAMILIES, "paper")
    check_rejects(ValueError, "no family 'paper'", architecture_from, SMALL["paper"].to_json())
    register(family)
    assert FAMILIES["paper"] is family


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_of_torch_changes_nothing(loaded, dtype):
    family, arch, transforms, prior = loaded
    arrays, tensors = exported(arch)
    torch.set_default_dtype(dtype)
    try:
        other, other_prior = family.transforms(arch, arrays, DEVICE), family.prior(arch, tensors, "cpu")
        again = other.analyse(images(), QUALITY)
        pixels = other.synthesise(torch.round(again.scaled).to(torch.int16), QUALITY, True, False)
        scores = other.score(again.latents[:, :, :3], QUALITY)
    finally:
        torch.set_default_dtype(torch.float32)
    analysed = transforms.analyse(images(), QUALITY)
    assert again.scaled.dtype == torch.float32 and torch.equal(again.scaled, analysed.scaled)
    assert torch.equal(
        pixels, transforms.synthesise(torch.round(analysed.scaled).to(torch.int16), QUALITY, True, False)
    )
    assert torch.equal(scores, transforms.score(analysed.latents[:, :, :3], QUALITY))
    assert torch.equal(other_prior.log_scales, prior.log_scales)
