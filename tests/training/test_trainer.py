"""The loop of a phase on networks of a few weights: steps, the log, checkpoints."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from deepsic_codec.training import checkpoint
from deepsic_codec.training.train import Trainer


class Loss:
    """A step of a phase, as a group of processes takes it. A number can take the place of one gradient."""

    def __init__(self, nets):
        self.nets, self.spoiled = nets, None

    def step(self, number, rng):
        loss = self.nets(torch.from_numpy(rng.normal(size=(4, 3))).float() + torch.rand(4, 3)).square().mean()
        loss.backward()
        if self.spoiled is not None:
            self.nets.weight.grad[0, 0] = self.spoiled
        return {"loss": loss.detach(), "mse": 2 * loss.detach()}


def make(folder, seed=1, state=None):
    torch.manual_seed(seed)
    nets = nn.Linear(3, 2)
    settings = SimpleNamespace(
        folder=folder, every=3, warm_up=0, processes=1, checkpoint_minutes=1e9, checkpoint_steps=0
    )
    groups = [{"params": list(nets.parameters()), "factor": 1}]
    phase = SimpleNamespace(name="joint", lr=0.1, steps=7, minutes=1e9, images=4, saved={}, groups=groups)
    rows = []
    log = SimpleNamespace(add=rows.append, write=lambda: None)
    run = SimpleNamespace(nets=nets, settings=settings, device="cpu")
    return Trainer(run, phase, np.random.default_rng(seed), log, state), Loss(nets), rows


def values(trainer):
    return [value.clone() for value in (*trainer.run.nets.state_dict().values(), *trainer.averages.values())]


@pytest.mark.parametrize("spoiled", [float("inf"), float("-inf"), float("nan")])
def test_a_step_without_a_finite_gradient_is_left_out(tmp_path, spoiled):
    trainer, loss, _ = make(tmp_path)
    trainer.step(loss)
    before = values(trainer)[:2]
    loss.spoiled = spoiled
    trainer.step(loss)
    assert all(torch.equal(one, two) for one, two in zip(before, values(trainer)[:2], strict=True))
    assert trainer.number == 2, "it counts all the same"
    loss.spoiled = None
    trainer.step(loss)
    assert all(value.isfinite().all() for value in values(trainer))
    assert not torch.equal(before[0], values(trainer)[0])


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_phase_takes_the_same_steps_and_logs_the_same_rows(tmp_path, stop):
    """Rows are means since the last row, also of the steps before a checkpoint between two rows."""
    trainer, loss, rows = make(tmp_path)
    while not trainer.is_done:
        if trainer.number == stop:
            trainer.save()
        trainer.step(loss)
    other, loss, later = make(tmp_path, seed=2, state=checkpoint.load(tmp_path))
    assert other.number == stop
    while not other.is_done:
        other.step(loss)
    assert all(torch.equal(one, two) for one, two in zip(values(trainer), values(other), strict=True))
    assert [row["step"] for row in rows] == [3, 6, 7]
    for row, expected in zip(later[::-1], rows[::-1], strict=False):
        for name in ("step", "loss", "psnr", "grad", "lr"):
            assert row[name] == expected[name], name
    assert len(later) == sum(step > stop for step in (3, 6, 7))
