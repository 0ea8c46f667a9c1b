"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321).

A rate-distortion loss pulls at the same weights in two directions, and steps that are scaled
entry by entry mostly cancel; scaled along the eigenvectors of the gradients' covariances they
do not, and networks of this kind learn the same in a fraction of the steps (Zhang and Zhu
2026, arXiv 2601.20769).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

#: Steps between two refinements of the eigenbases, on a CPU and, once they have settled, on a GPU, which is slow at
#: small decompositions.
EVERY, EVERY_CUDA, SETTLED = 10, 50, 500
#: Sides of a matrix that are longer keep their own basis: finding another costs more than it gains.
LARGEST = 320
SIDES = (("rows", 0), ("columns", 1))


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
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._updates: _Replayed | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; the first only measures, wherever there is a basis to find."""
        loss = closure() if closure else None
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # along small eigenvectors, what TF32 rounds off is all there is
        try:
            fresh = [p for p, _ in found if not self.state[p]]
            measured = {id(p) for p in fresh if self._begun(p)}
            moved = [(p, group) for p, group in found if id(p) not in measured]
            sizes = [self._size(p, group) for p, group in moved]
            for p, group in moved:
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
            if moved and not fresh and all(p.is_cuda for p, _ in moved):
                if self._updates is None or not self._updates.fits(moved, self.state):
                    self._updates = _Replayed(moved, self.state)
                self._updates.run(sizes)
            else:
                for (p, group), size in zip(moved, sizes, strict=True):
                    _move(p, _matrix(p.grad), self.state[p], group, size)
            for place, (p, _) in enumerate(moved):
                state, number = self.state[p], int(self.state[p]["step"])
                every = EVERY_CUDA if p.is_cuda and number > SETTLED else EVERY
                if (number + place) % every == 0:  # not all in one step
                    for name, side in _sides(p):
                        _refine(state, name, side)
        finally:
            torch.set_float32_matmul_precision(before)
        return loss

    def _begun(self, p: Tensor) -> bool:
        """Set up a parameter's state; whether it has bases, which this gradient went into."""
        state, matrix, sides = self.state[p], _matrix(p.grad), _sides(p)
        state["step"] = torch.zeros(())
        state["mean"], state["square"] = torch.zeros_like(matrix), torch.zeros_like(matrix)
        for name, side in sides:
            state["covariance_" + name] = _outer(matrix, side)
            state["basis_" + name] = _eigenbasis(state["covariance_" + name])
        return bool(sides)

    def _size(self, p: Tensor, group: dict[str, Any]) -> float:
        """Count a step; its length, with what corrects averages that began at zero."""
        self.state[p]["step"] += 1
        number, (first, second) = int(self.state[p]["step"]), group["betas"]
        return float(group["lr"] * (1 - second**number) ** 0.5 / (1 - first**number))


class _Replayed:
    """Updates of many parameters as one CUDA graph: they are thousands of operations too small for a GPU."""

    def __init__(self, moved: list[tuple[Tensor, dict[str, Any]]], states: Mapping[Tensor, Any]) -> None:
        self._parameters = [p for p, _ in moved]
        self._states = [states[p] for p in self._parameters]
        self._gradients = [torch.empty_like(p) for p in self._parameters]  # a graph reads from one place
        self._sizes = torch.zeros(len(moved), device=self._parameters[0].device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for (p, group), g, state, size in zip(moved, self._gradients, self._states, self._sizes, strict=True):
                _move(p, _matrix(g), state, group, size)

    def fits(self, moved: list[tuple[Tensor, dict[str, Any]]], states: Mapping[Tensor, Any]) -> bool:
        """Whether it is for these."""
        before = zip(self._parameters, self._states, strict=True)
        return len(moved) == len(self._parameters) and all(
            p is q and states[p] is state for (p, _), (q, state) in zip(moved, before, strict=True)
        )

    def run(self, sizes: list[float]) -> None:
        """Move all parameters by their gradients."""
        torch._foreach_copy_(self._gradients, [p.grad for p in self._parameters])
        self._sizes.copy_(torch.tensor(sizes))
        self._graph.replay()


def _move(p: Tensor, matrix: Tensor, state: dict[str, Tensor], group: dict[str, Any], size: float | Tensor) -> None:
    """A parameter's step, and the averages that it comes from; all in place."""
    first, second = group["betas"]
    turned = _turn(matrix, state)
    mean = state["mean"].lerp_(turned, 1 - first)
    square = state["square"].mul_(second).addcmul_(turned, turned, value=1 - second)
    change = _turn_back(mean / square.sqrt().add_(group["eps"]), state)
    p.sub_(change.reshape(p.shape).mul_(size))
    for name, side in _sides(p):
        state["covariance_" + name].lerp_(_outer(matrix, side), 1 - second)


def _matrix(gradient: Tensor) -> Tensor:
    """Of the first dimension by all others."""
    return gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient[None]


def _sides(p: Tensor) -> list[tuple[str, int]]:
    """Sides of a parameter's matrix that get a basis: name, dimension."""
    shape = (len(p), p.numel() // max(1, len(p))) if p.ndim > 1 else ()
    return [(name, side) for (name, side), n in zip(SIDES, shape, strict=False) if 1 < n <= LARGEST]


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
    basis.copy_(new)  # in place, as a CUDA graph knows where it lies
    state["mean"].copy_(change.T @ state["mean"] if side == 0 else state["mean"] @ change)
    state["square"].copy_(state["square"].index_select(side, order))
