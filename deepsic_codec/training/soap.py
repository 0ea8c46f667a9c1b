"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321).

A rate-distortion loss pulls at the same weights in two directions, and steps that are scaled
entry by entry mostly cancel; scaled along the eigenvectors of the gradients' covariances they
do not, and networks of this kind learn the same in a fraction of the steps (Zhang and Zhu
2026, arXiv 2601.20769).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: Steps between two refinements of the eigenbases, on a CPU and on a GPU, which is slow at small decompositions.
EVERY, EVERY_CUDA = 10, 50
#: Sides of a matrix that are longer keep their own basis: finding another costs more than it gains.
LARGEST = 320


class Soap(torch.optim.Optimizer):
    """Adam, for each matrix in the eigenbases of the covariances of its gradient's rows and columns.

    Parameters
    ----------
    params : iterable of dict
        Groups of parameters, as for :class:`torch.optim.AdamW`.  What has two dimensions or
        more is a matrix of its first by all others; the rest is left to plain Adam.
    lr, betas, eps, weight_decay
        As for Adam with decoupled weight decay; covariances are averaged as the second moments.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.95, 0.98), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; the first only measures, wherever there is a basis to find."""
        loss = closure() if closure else None
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # along small eigenvectors, what TF32 rounds off is all there is
        try:
            for number, (p, group) in enumerate(found):
                self._update(p, group, number)
        finally:
            torch.set_float32_matmul_precision(before)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], place: int) -> None:
        first, second = group["betas"]
        state, gradient = self.state[p], p.grad
        matrix = gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient[None]
        sides = _sides(matrix) if gradient.ndim > 1 else []
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(matrix), torch.zeros_like(matrix)
            for name, side in sides:
                state["covariance_" + name] = _outer(matrix, side)
                state["basis_" + name] = _eigenbasis(state["covariance_" + name])
            if sides:
                return
        state["step"] += 1
        number = int(state["step"])
        turned = _turn(matrix, state)
        mean = state["mean"].lerp_(turned, 1 - first)
        square = state["square"].mul_(second).addcmul_(turned, turned, value=1 - second)
        size = group["lr"] * (1 - second**number) ** 0.5 / (1 - first**number)
        change = _turn_back(mean / square.sqrt().add_(group["eps"]), state)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(change.reshape(p.shape), alpha=-size)
        every = EVERY_CUDA if p.is_cuda else EVERY
        for name, side in sides:
            state["covariance_" + name].lerp_(_outer(matrix, side), 1 - second)
            if (number + place) % every == 0:  # not all in one step
                _refine(state, name, side)


def _sides(matrix: Tensor) -> list[tuple[str, int]]:
    """Sides that get a basis: name, dimension."""
    return [(name, side) for name, side in (("rows", 0), ("columns", 1)) if 1 < matrix.shape[side] <= LARGEST]


def _outer(matrix: Tensor, side: int) -> Tensor:
    return matrix @ matrix.T if side == 0 else matrix.T @ matrix


def _eigenbasis(covariance: Tensor) -> Tensor:
    """Eigenvectors, those of the largest values first."""
    exact = covariance.double()
    exact.diagonal().add_(exact.diagonal().mean() * 1e-6 + 1e-30)  # few gradients have many values of zero
    return torch.linalg.eigh(exact / exact.diagonal().mean())[1].flip(1).to(covariance)


def _turn(matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Into the eigenbases."""
    if "basis_rows" in state:
        matrix = state["basis_rows"].T @ matrix
    return matrix @ state["basis_columns"] if "basis_columns" in state else matrix


def _turn_back(matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
    if "basis_rows" in state:
        matrix = state["basis_rows"] @ matrix
    return matrix @ state["basis_columns"].T if "basis_columns" in state else matrix


def _refine(state: dict[str, Tensor], name: str, side: int) -> None:
    """One step of subspace iteration; the averages of the steps follow into the new basis."""
    covariance, basis = state["covariance_" + name], state["basis_" + name]
    product = covariance @ basis
    order = (basis * product).sum(0).argsort(descending=True)
    new = torch.linalg.qr(product[:, order])[0]
    change = basis.T @ new
    state["basis_" + name] = new
    state["mean"] = change.T @ state["mean"] if side == 0 else state["mean"] @ change
    state["square"] = state["square"].index_select(side, order)
