"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321).

Rate and distortion pull at the same weights in two directions, and steps that are scaled entry by entry mostly cancel.
Steps that are scaled along the eigenvectors of the gradients' covariances do not: networks of this kind learn the same
in a fraction of the steps (Zhang and Zhu 2026, arXiv 2601.20769).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

#: Steps between two refinements of an eigenbasis.
REFINE_STEPS = 10
#: The same on a GPU, which is slow at small decompositions, after `SETTLED_STEPS`.
REFINE_STEPS_CUDA = 50
SETTLED_STEPS = 500
#: Longest side of a matrix that gets an eigenbasis; for longer ones it costs more than it gains.
MAX_SIDE = 320
SIDES = (("rows", 0), ("columns", 1))


class Soap(torch.optim.Optimizer):
    """Adam, for each matrix in the eigenbases of the covariances of its gradient's rows and columns.

    Parameters
    ----------
    params : iterable of dict
        Groups of parameters, as for `torch.optim.AdamW`. A parameter with two dimensions or more is treated as the
        matrix of its first dimension by all others, any other parameter as in Adam.
    lr, betas, eps, weight_decay
        As for Adam with decoupled weight decay. Covariances are averaged as the second moments.
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
        self._recorded: _RecordedUpdates | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step. The first step of a matrix only measures its covariances."""
        loss = closure() if closure else None
        updates = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 would round off the small eigenvectors
        try:
            fresh = [p for p, _ in updates if not self.state[p]]
            measured = {id(p) for p in fresh if self._set_up(p)}
            updates = [(p, group) for p, group in updates if id(p) not in measured]
            sizes = [self._count_step(p, group) for p, group in updates]
            for p, group in updates:
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
            if updates and not fresh and all(p.is_cuda for p, _ in updates):
                if self._recorded is None or not self._recorded.fits(updates, self.state):
                    self._recorded = _RecordedUpdates(updates, self.state)
                self._recorded.run(sizes)
            else:
                for (p, group), size in zip(updates, sizes, strict=True):
                    _update(p, _matrix(p.grad), self.state[p], group, size)
            for number, (p, _) in enumerate(updates):
                state, step = self.state[p], int(self.state[p]["step"])
                every = REFINE_STEPS_CUDA if p.is_cuda and step > SETTLED_STEPS else REFINE_STEPS
                if (step + number) % every == 0:  # not all parameters in one step
                    for name, side in _sides(p):
                        _refine(state, name, side)
        finally:
            torch.set_float32_matmul_precision(before)
        return loss

    def _set_up(self, p: Tensor) -> bool:
        """Set up the state of a parameter; return whether it has eigenbases, which its gradient was used for."""
        state, matrix, sides = self.state[p], _matrix(p.grad), _sides(p)
        state["step"] = torch.zeros(())
        state["mean"], state["square"] = torch.zeros_like(matrix), torch.zeros_like(matrix)
        for name, side in sides:
            state["covariance_" + name] = _covariance(matrix, side)
            state["basis_" + name] = _eigenbasis(state["covariance_" + name])
        return bool(sides)

    def _count_step(self, p: Tensor, group: dict[str, Any]) -> float:
        """Count a step and return its size, corrected for averages that began at zero."""
        self.state[p]["step"] += 1
        number, (first, second) = int(self.state[p]["step"]), group["betas"]
        return float(group["lr"] * (1 - second**number) ** 0.5 / (1 - first**number))


class _RecordedUpdates:
    """Updates of all parameters as one CUDA graph: they are thousands of operations too small for a GPU."""

    def __init__(self, updates: list[tuple[Tensor, dict[str, Any]]], states: Mapping[Tensor, Any]) -> None:
        self._parameters = [p for p, _ in updates]
        self._states = [states[p] for p in self._parameters]
        self._gradients = [torch.empty_like(p) for p in self._parameters]  # a graph reads from fixed addresses
        self._sizes = torch.zeros(len(updates), device=self._parameters[0].device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for (p, group), g, state, size in zip(updates, self._gradients, self._states, self._sizes, strict=True):
                _update(p, _matrix(g), state, group, size)

    def fits(self, updates: list[tuple[Tensor, dict[str, Any]]], states: Mapping[Tensor, Any]) -> bool:
        """Whether these parameters and states are the recorded ones."""
        recorded = zip(self._parameters, self._states, strict=True)
        return len(updates) == len(self._parameters) and all(
            p is q and states[p] is state for (p, _), (q, state) in zip(updates, recorded, strict=True)
        )

    def run(self, sizes: list[float]) -> None:
        torch._foreach_copy_(self._gradients, [p.grad for p in self._parameters if p.grad is not None])
        self._sizes.copy_(torch.tensor(sizes))
        self._graph.replay()


def _update(p: Tensor, matrix: Tensor, state: dict[str, Tensor], group: dict[str, Any], size: float | Tensor) -> None:
    """Move a parameter by its gradient and update its averages, in place."""
    first, second = group["betas"]
    rotated = _rotate(matrix, state)
    mean = state["mean"].lerp_(rotated, 1 - first)
    square = state["square"].mul_(second).addcmul_(rotated, rotated, value=1 - second)
    change = _rotate_back(mean / square.sqrt().add_(group["eps"]), state)
    p.sub_(change.reshape(p.shape).mul_(size))
    for name, side in _sides(p):
        state["covariance_" + name].lerp_(_covariance(matrix, side), 1 - second)


def _matrix(gradient: Tensor | None) -> Tensor:
    """Return the matrix of the first dimension by all others."""
    assert gradient is not None
    return gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient[None]


def _sides(p: Tensor) -> list[tuple[str, int]]:
    """Return name and dimension of each side of a parameter's matrix that gets an eigenbasis."""
    shape = (len(p), p.numel() // max(1, len(p))) if p.ndim > 1 else ()
    return [(name, side) for (name, side), n in zip(SIDES, shape, strict=False) if 1 < n <= MAX_SIDE]


def _covariance(matrix: Tensor, side: int) -> Tensor:
    return matrix @ matrix.T if side == 0 else matrix.T @ matrix


def _eigenbasis(covariance: Tensor) -> Tensor:
    """Return the eigenvectors, those of the largest values first."""
    exact = covariance.double()
    exact.diagonal().add_(exact.diagonal().mean() * 1e-6 + 1e-30)  # few gradients have many eigenvalues of zero
    basis = torch.linalg.eigh(exact / exact.diagonal().mean())[1].flip(1).to(covariance)
    return basis.contiguous()  # as a checkpoint restores it: products depend on the layout in their last bits


def _rotate(matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return the matrix in the eigenbases."""
    if "basis_rows" in state:
        matrix = state["basis_rows"].T @ matrix
    return matrix @ state["basis_columns"] if "basis_columns" in state else matrix


def _rotate_back(matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
    if "basis_rows" in state:
        matrix = state["basis_rows"] @ matrix
    return matrix @ state["basis_columns"].T if "basis_columns" in state else matrix


def _refine(state: dict[str, Tensor], name: str, side: int) -> None:
    """Improve an eigenbasis by one step of subspace iteration, and bring the averages into it."""
    covariance, basis = state["covariance_" + name], state["basis_" + name]
    product = covariance @ basis
    order = (basis * product).sum(0).argsort(descending=True)
    new = torch.linalg.qr(product[:, order])[0]
    change = basis.T @ new
    basis.copy_(new)  # in place, because a CUDA graph reads from this address
    state["mean"].copy_(change.T @ state["mean"] if side == 0 else state["mean"] @ change)
    state["square"].copy_(state["square"].index_select(side, order))
