"""Training steps as CUDA graphs.

The networks are thousands of operations on small tensors, which a GPU finishes sooner than
Python can ask for them.  Recorded once and replayed, they cost one call a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Measures = dict[str, Tensor]
Function = Callable[..., Measures]
#: Runs before the recording, in which libraries choose their algorithms and caches fill.
WARM_UPS = 3


class Graphs:
    """Calls of a function that adds to gradients, recorded for each set of shapes that it is called with.

    Parameters
    ----------
    function : callable
        Tensors -> measures; begins with no gradients, leaves those of its loss, and waits for
        nothing that the device computes.
    parameters : sequence of Parameter
        Whose gradients it leaves.
    """

    def __init__(self, function: Function, parameters: Sequence[nn.Parameter]) -> None:
        self._function, self._parameters = function, parameters
        self._recorded: dict[tuple[torch.Size, ...], _Recording] = {}

    def __call__(self, *inputs: Tensor) -> Measures:
        """Gradients and measures for these inputs; each set of shapes is recorded when it first comes."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._recorded:
            self._recorded[shapes] = _Recording(self._function, self._parameters, inputs)
        return self._recorded[shapes].replay(inputs)


class _Recording:
    def __init__(self, function: Function, parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor]) -> None:
        self._parameters, self._inputs = parameters, [x.clone() for x in inputs]
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._forget()
                function(*self._inputs)
        here.wait_stream(aside)
        self._forget()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._measures = function(*self._inputs)
        self._gradients = [p.grad for p in parameters]

    def replay(self, inputs: Sequence[Tensor]) -> Measures:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        return {k: v.clone() for k, v in self._measures.items()}

    def _forget(self) -> None:
        for p in self._parameters:
            p.grad = None
