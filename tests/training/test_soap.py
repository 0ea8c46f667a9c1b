"""The optimiser SOAP: results on problems that are hard for Adam, and its state."""

import copy
import math

import pytest
import torch

from deepsic_codec.training.soap import MAX_SIDE, REFINE_STEPS, Soap


def problem(outputs, inputs, seed=0):
    """Return the loss of a matrix on noisy batches of correlated inputs, and its error without noise."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    mixing = turn * torch.logspace(0, -1.5, inputs) @ turn.T
    goal = torch.randn(outputs, inputs, generator=generator)

    def batch(w):
        x = mixing @ torch.randn(inputs, 64, generator=generator)
        return ((w - goal) @ x + 0.1 * torch.randn(outputs, 64, generator=generator)).square().mean()

    return batch, lambda w: float(((w.detach() - goal) @ mixing).square().mean())


def minimise(make, loss, shape, steps):
    w = torch.zeros(shape, requires_grad=True)
    optimiser = make([{"params": [w]}])
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = optimiser.defaults["lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        loss(w).backward()
        optimiser.step()
    return w, optimiser


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (40, 40), (MAX_SIDE + 1, 30)])
def test_correlated_inputs_are_learnt_faster_than_by_adam(shape):
    errors = []
    for make in (lambda p: Soap(p, lr=0.3), lambda p: torch.optim.AdamW(p, lr=0.3, weight_decay=0)):
        batch, error = problem(*shape)
        errors.append(error(minimise(make, batch, shape, 300)[0]))
    assert errors[0] < 0.5 * errors[1]


def test_bases_stay_orthonormal_and_the_first_step_only_measures():
    loss = problem(16, 30)[0]
    assert not minimise(lambda p: Soap(p, lr=0.02), loss, (16, 30), 1)[0].any()
    w, optimiser = minimise(lambda p: Soap(p, lr=0.02), loss, (16, 30), 5 * REFINE_STEPS + 3)
    for name, n in (("basis_rows", 16), ("basis_columns", 30)):
        basis = optimiser.state[w][name]
        torch.testing.assert_close(basis.T @ basis, torch.eye(n), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(7,), (6, 5), (6, 5, 1, 1), (6, 1, 3, 3)])
def test_continues_from_its_state(shape):
    """To the last bit, from tensors as a checkpoint restores them: row by row in memory."""
    goal = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    loss = lambda w: (w - goal).square().sum()  # noqa: E731
    w, optimiser = minimise(lambda p: Soap(p, lr=0.1, weight_decay=0.01), loss, shape, REFINE_STEPS + 5)
    other = w.detach().clone().requires_grad_(True)
    resumed = Soap([{"params": [other]}], lr=0.1, weight_decay=0.01)
    stored = copy.deepcopy(optimiser.state_dict())
    stored["state"] = {i: {name: v.contiguous() for name, v in slots.items()} for i, slots in stored["state"].items()}
    resumed.load_state_dict(stored)
    for _ in range(REFINE_STEPS + 2):
        for p, o in ((w, optimiser), (other, resumed)):
            o.zero_grad()
            loss(p).backward()
            o.step()
    assert torch.equal(w, other) and loss(w) < 0.8 * loss(torch.zeros(shape))


def test_a_gradient_of_zeros_changes_nothing():
    w = torch.ones(5, 4, requires_grad=True)
    optimiser = Soap([{"params": [w]}], lr=0.1)
    for _ in range(REFINE_STEPS + 2):
        w.grad = torch.zeros(5, 4)
        optimiser.step()
    assert torch.equal(w, torch.ones(5, 4))
