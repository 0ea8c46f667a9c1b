"""Larger networks begin with the weights of smaller ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.networks import STREAM_MAX
from deepsic_codec.training import phases
from deepsic_codec.training.data import Photographs
from deepsic_codec.training.grow import _shared_steps, grow, residual_transform
from deepsic_codec.training.klt import linear_start
from deepsic_codec.training.loss import cells_of
from deepsic_codec.training.run import TINY, make_networks
from deepsic_codec.training.start import load_networks
from deepsic_codec.training.train import train
from tests.common import check_rejects
from tests.training.conftest import JOINT_ONLY, settings

#: Grows into `LARGER`.
FIRST = replace(TINY, prior_detail=16)
LARGER = replace(
    TINY,
    latents=40,
    prior_groups=(4, 12, 24),
    analysis_blocks=(2, 0),
    synthesis_blocks=(2, 1),
    head_blocks=4,
)


@pytest.fixture(scope="module")
def photos(data):
    return Photographs([data.photos], 64)


@pytest.fixture(scope="module")
def small(photos):
    """Small networks that differ from their start."""
    torch.manual_seed(0)
    nets = make_networks(FIRST)
    linear_start(nets, photos, 50)
    with torch.no_grad():
        for parameter in nets.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        block = nets.analysis.blocks16[0]
        nn.init.constant_(block.up.bias, -1e3)  # idle, as training leaves some blocks
        nn.init.normal_(block.down.bias)
    return nets.eval()


def grown(small, photos, arch=LARGER):
    torch.manual_seed(1)
    nets = make_networks(arch)
    grow(nets, small, photos, 50)
    return nets.eval()


@torch.no_grad()
def test_old_latents_stay_and_new_ones_reduce_the_error(small, photos):
    nets = grown(small, photos)
    x = torch.tensor(photos.held_out[0][:64, :64]).permute(2, 0, 1)[None].float()
    q = torch.tensor([100.0])
    before, after = small.analysis(x, q), nets.analysis(x, q)
    torch.testing.assert_close(after[:, :16], before, rtol=1e-4, atol=1e-4)
    error = [(net.synthesis(y, q) - x).square().mean().item() for net, y in ((small, before), (nets, after))]
    assert error[1] < 0.7 * error[0]
    symbols = torch.round(after * nets.gains(q))
    old, new = (net.prior(s, q) for net, s in ((small, symbols[:, :16]), (nets, symbols)))
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(b[:, :16], a, rtol=1e-4, atol=1e-4)
    silent = nets.synthesis(torch.cat([before, torch.zeros_like(after[:, 16:])], 1), q)
    torch.testing.assert_close(silent, small.synthesis(before, q), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(nets.head(after, q), small.head(before, q), rtol=1e-4, atol=1e-4)


def test_smaller_contexts_keep_the_weights_of_their_inputs(small, photos):
    nets = grown(small, photos, replace(LARGER, prior_detail=2))
    for net, step, old, old_step in _shared_steps(nets, small):
        old_names = old_step.input_names() if old.has_inputs else []
        columns = {name: old.first.weight[:, i] for i, name in enumerate(old_names)}
        names = step.input_names()
        assert len(names) == step.input_count and set(names) <= set(columns)
        for i, name in enumerate(names):
            assert torch.equal(net.first.weight[:, i], columns[name])
        assert (net.direct is not None) == step.signed
    last = small.prior.steps[-1]
    assert len(columns) == last.input_count > len(names)


def test_head_of_another_width_is_new(small, photos):
    nets = grown(small, photos, replace(LARGER, head_width=24, head_blocks=1))
    assert nets.head.stem.weight.shape[0] == 24 and nets.head.stem.weight.abs().amin() > 0


def test_all_additions_have_gradients(small, photos):
    nets = grown(small, photos).train()
    terms = nets.terms(photos.crops(2, 64, np.random.default_rng(0)), torch.tensor([60.0, 90.0]), False)
    (nets.loss(terms, torch.tensor([60.0, 90.0])) + terms.logits.square().mean()).backward()
    for gradient in (
        nets.synthesis.stem.weight.grad[:, 16:],
        nets.head.stem.weight.grad[:, 16:],
        nets.analysis.out.weight.grad[16:],
        nets.analysis.linear.weight.grad[16:],
        nets.analysis.blocks8[1].down.weight.grad,
        nets.gains.log2.table.grad[:, 16:],
        nets.synthesis.blocks8[1].down.weight.grad,
        nets.prior.networks[-1].out.weight.grad,
    ):
        assert gradient.abs().amax() > 0


def test_components_are_orthonormal_and_sorted_by_variance(small, photos):
    forward, backward, variances = residual_transform(small, photos, 24, 50)
    torch.testing.assert_close(backward.T @ backward, torch.eye(24), rtol=0, atol=1e-5)
    assert forward.shape == (24, 768) and (variances > 0).all() and variances[:4].mean() > variances[-4:].mean()


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"prior_groups": (8, 8, 24)}, "prior groups [8, 8, 24] do not begin with"),
        ({"synthesis_blocks": (2, 0)}, "synthesis_blocks [2, 0] are fewer than [1, 1]"),
        ({"analysis_blocks": (0, 1)}, "analysis_blocks [0, 1] are fewer"),
        ({"head_blocks": 1}, "head_blocks 1 are fewer than 3"),
        ({"prior_width": 32}, "prior_width 32, not 16"),
    ],
)
def test_other_architectures_are_refused(small, photos, change, reason):
    check_rejects(ConfigurationError, reason, grown, small, photos, replace(LARGER, **change))


def test_head_with_fewer_blocks_is_refused(photos):
    old = make_networks(replace(TINY, head_blocks=2))
    words = "head_blocks 1 are fewer than 2"
    check_rejects(ConfigurationError, words, grown, old, photos, replace(LARGER, head_blocks=1))


def test_run_started_from_a_model_file(trained, data, tmp_path):
    folder, info = trained
    started = train(settings(data, tmp_path, start=info.path, **JOINT_ONLY | {"steps": 0, "prior_steps": 1}))
    assert started.vocabulary.names == info.vocabulary.names
    nets = [load_networks(path / "run") for path in (folder, tmp_path)]
    # weights of a model file are rounded and have another scale
    for part in ("analysis.linear.weight", "synthesis.linear.weight"):
        a, b = (net.state_dict()[part] for net in nets)
        torch.testing.assert_close(b, a, rtol=0, atol=1e-3)


def test_networks_of_a_model_file_are_trained_within_bounds(trained, data, tmp_path, monkeypatch):
    """Without bounds, errors of single images can grow until they spoil whole steps."""
    forms = []
    original = phases.joint_gradients

    def gradients(run, *drawn):
        forms.append((run.nets.integer, run.nets.bounded))
        if len(forms) == 2:
            raise RuntimeError("power cut")
        return original(run, *drawn)

    monkeypatch.setattr(phases, "joint_gradients", gradients)
    s = settings(data, tmp_path, start=trained[1].path, checkpoint_steps=1, **JOINT_ONLY | {"steps": 2})
    with pytest.raises(RuntimeError, match="power cut"):
        train(s)
    train(s, resume=True)
    assert forms == [(False, True)] * 3


def test_bounded_transforms_stay_in_the_range_of_integers():
    torch.manual_seed(0)
    nets, largest = make_networks(TINY).eval(), []
    blocks = [b for t in (nets.analysis, nets.synthesis) for b in (*t.blocks8, *t.blocks16)]
    for block in (*blocks, *nets.head.blocks):
        for p in block.parameters():
            p.data.mul_(4)
        block.register_forward_hook(lambda block, x, out: largest.append(float(out.detach().abs().max())))
    x, q = 255 * torch.rand(2, 3, 64, 64), torch.tensor([20.0, 80.0])
    for bounded in (False, True):
        largest.clear()
        nets.bounded = bounded
        y = nets.analysis(x, q)
        nets.synthesis(10 * y, q)
        nets.head(cells_of(10 * y), q)
        assert len(largest) == 4 + TINY.head_blocks and (max(largest) <= STREAM_MAX) == bounded
