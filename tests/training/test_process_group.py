"""Processes that share a step: mean of the gradients, failures, draws that depend on the step alone."""

import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.training import train
from deepsic_codec.training.process_group import ProcessGroup
from deepsic_codec.training.settings import Settings
from tests.common import check_rejects
from tests.training.conftest import losses, settings, train_interrupted

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


@pytest.fixture
def weights():
    return [torch.nn.Parameter(torch.arange(4.0)), torch.nn.Parameter(torch.ones(2, 3))]


def test_gradients_are_the_mean_of_all_processes(weights):
    def step(number, rng):
        weights[0].grad = torch.full((4,), float(rng.integers(1000)))
        if number % 2:  # no gradient of the second parameter in even steps
            weights[1].grad = weights[1].detach() * 5
        return {"loss": torch.tensor(float(number))}

    with ProcessGroup(step, weights, 3, (7,)) as group:
        for number in (0, 1, 5, 2):
            for p in weights:
                p.grad = None
            assert group.step(number, np.random.default_rng(100 + number))["loss"] == number
            seeds = (100 + number, (7, 1, number), (7, 2, number))
            drawn = [np.random.default_rng(seed).integers(1000) for seed in seeds]
            assert torch.allclose(weights[0].grad, torch.full((4,), sum(drawn) / 3))
            assert torch.equal(weights[1].grad, weights[1].detach() * (5 if number % 2 else 0))
            with torch.no_grad():
                weights[1].add_(1)  # in all processes


def test_failure_of_another_process_is_reported(weights):
    parent = os.getpid()

    def step(number, rng):
        if os.getpid() != parent:
            if number:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no such image")
        return {}

    with ProcessGroup(step, weights, 2, (0,)) as group:
        with pytest.raises(RuntimeError, match="ValueError: no such image"):
            group.step(0, np.random.default_rng())
        with pytest.raises(RuntimeError, match="exit code -9"):
            group.step(1, np.random.default_rng())


def test_one_process_shares_no_memory(weights):
    def step(number, rng):
        weights[0].grad = torch.ones(4)
        return {}

    with ProcessGroup(step, weights, 1, ()) as group:
        group.step(0, np.random.default_rng())
    assert torch.equal(weights[0].grad, torch.ones(4)) and not weights[0].is_shared()


def test_training_in_two_processes_resumes_exactly(data, tmp_path, monkeypatch):
    changes = {"processes": 2, "mosaics_per_step": 2, "prior_batch": 4}
    changes |= {"steps": 4, "integer_steps": 1, "prior_steps": 2, "synthesis_steps": 2, "head_steps": 2}
    # waiting for threads takes minutes on a busy machine
    monkeypatch.setattr(train, "_all_cores", lambda s: nullcontext())
    threads, (first, second) = torch.get_num_threads(), (tmp_path / "first", tmp_path / "second")
    info = train.train(settings(data, first, **changes))
    assert torch.get_num_threads() == threads
    interrupted = settings(data, second, **changes)
    train_interrupted(interrupted, monkeypatch, "joint", 2)
    resumed = train.train(interrupted, resume=True)
    assert [r[:2] for r in losses(second)] == [r[:2] for r in losses(first)]
    np.testing.assert_allclose([r[2] for r in losses(second)], [r[2] for r in losses(first)], rtol=1e-5)
    assert (resumed.decoder, resumed.head) == (info.decoder, info.head)


def test_settings_that_cannot_be_shared_are_refused():
    for words, changes in (
        ("photos_per_step 3", {"photos_per_step": 3}),
        ("leave out --threads", {"threads": 2}),
        ("at least 1", {"processes": 0}),
    ):
        check_rejects(ConfigurationError, words, Settings, **{"images": ["x"], "processes": 2} | changes)
