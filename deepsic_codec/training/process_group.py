"""Processes of one thread that share each training step on a CPU.

Most layers here are too small to be shared by several threads. Processes share the memory of the parameters, and
exchange gradients once a step.
"""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

Step = Callable[[int, np.random.Generator], dict[str, Tensor]]


class ProcessGroup:
    """The current process and others forked from it, which take the same step with other random draws.

    Parameters
    ----------
    step : callable
        Takes the number of the step and the generator of the data. Adds to the gradients of `parameters` and returns
        the measures.
    parameters : sequence of Parameter
        Parameters to train. Their memory becomes shared, so updates must be in place.
    count : int
        Number of processes, the current one included.
    seed : tuple of int
        Seed of the draws of the other processes. A step's draws depend on its number alone, so that a resumed run
        continues as the uninterrupted run would.
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter], count: int, seed: tuple[int, ...]) -> None:
        self._step, self._parameters, self._seed = step, parameters, seed
        for parameter in parameters if count > 1 else ():
            parameter.data = parameter.data.share_memory_()
        self._sizes = [parameter.numel() for parameter in parameters]
        self._gradients = torch.zeros(max(0, count - 1), sum(self._sizes)).share_memory_()
        context = multiprocessing.get_context("fork")  # the images are in memory already: forked, they stay there once
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        for rank in range(1, count):
            pipe, worker_pipe = context.Pipe()
            process = context.Process(target=self._work, args=(worker_pipe, pipe, rank), daemon=True)
            process.start()
            worker_pipe.close()
            self._workers.append((process, pipe))

    def step(self, number: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Take a step in all processes. Leaves the mean of their gradients, and returns the measures of this one.

        Raises
        ------
        RuntimeError
            If another process failed or was ended.
        """
        for _, pipe in self._workers:
            pipe.send(number)
        measures = self._step(number, rng)
        for process, pipe in self._workers:
            try:
                problem = pipe.recv()
            except EOFError:
                process.join()
                problem = f"ended with exit code {process.exitcode}"
            if problem:
                raise RuntimeError(f"a process of --processes failed: {problem}")
        if self._workers:
            sums = self._gradients.sum(0).split(self._sizes)
            for parameter, rest in zip(self._parameters, sums, strict=True):
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = gradient.add_(rest.view_as(parameter)).div_(1 + len(self._workers))
        return measures

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in self._workers:
            pipe.close()  # which ends the process
            process.join(10)
            process.kill()
        self._workers = []

    def _work(self, pipe: Connection, parent_pipe: Connection, rank: int) -> None:
        """Run in another process: take a step for each number that arrives."""
        parent_pipe.close()  # inherited by the fork; the pipe would stay open
        for number in (signal.SIGINT, signal.SIGTERM):  # the parent writes the checkpoint, then ends this process
            signal.signal(number, signal.SIG_IGN)
        for _, earlier in self._workers:
            earlier.close()
        while True:
            try:
                step = pipe.recv()
            except EOFError:
                return
            try:
                self._take(step, rank)
                problem = ""
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            with suppress(BrokenPipeError):  # the parent gave this step up
                pipe.send(problem)

    def _take(self, step: int, rank: int) -> None:
        """Take one step and leave its gradients in shared memory."""
        for parameter in self._parameters:
            parameter.grad = None
        seed = (*self._seed, rank, step)
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        self._step(step, np.random.default_rng(seed))
        parts = self._gradients[rank - 1].split(self._sizes)
        for parameter, part in zip(self._parameters, parts, strict=True):
            part.zero_() if parameter.grad is None else part.copy_(parameter.grad.reshape(-1))
