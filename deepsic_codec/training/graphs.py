"""Training steps as CUDA graphs.

The networks are thousands of operations on small tensors. A GPU finishes them sooner than Python can launch them. A
recorded step is launched by one call.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Measures = dict[str, Tensor]
Function = Callable[..., Measures]
#: Runs before the recording, in which libraries choose their algorithms and caches fill.
WARM_UPS = 3


class Graphs:
    """A function that adds to gradients, recorded for each set of input shapes.

    Parameters
    ----------
    function : callable
        Takes tensors and returns measures. It starts without gradients, leaves those of its loss, and does not wait
        for the device.
    parameters : sequence of Parameter
        Parameters whose gradients it leaves.
    """

    def __init__(self, function: Function, parameters: Sequence[nn.Parameter]) -> None:
        self._function, self._parameters = function, parameters
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    def __call__(self, *inputs: Tensor) -> Measures:
        """Leave the gradients for these inputs and return the measures; new shapes are recorded first."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._recordings:
            self._recordings[shapes] = _Recording(self._function, self._parameters, inputs)
        return self._recordings[shapes].replay(inputs)


class _Recording:
    def __init__(self, function: Function, parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor]) -> None:
        self._parameters, self._inputs = parameters, [x.clone() for x in inputs]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._clear_gradients()
                function(*self._inputs)
        current.wait_stream(side)
        self._clear_gradients()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._measures = function(*self._inputs)
        self._gradients = [p.grad for p in parameters]

    def replay(self, inputs: Sequence[Tensor]) -> Measures:
        for recorded, x in zip(self._inputs, inputs, strict=True):
            recorded.copy_(x)
        self._graph.replay()
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        return {k: v.clone() for k, v in self._measures.items()}

    def _clear_gradients(self) -> None:
        for p in self._parameters:
            p.grad = None
