"""Processes of one thread that share out each training step of a CPU.

Most layers here are too small for several threads to share one of them; processes share nothing
but the parameters' memory, and exchange gradients once a step.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

Step = Callable[[int, np.random.Generator], dict[str, Tensor]]


class Team:
    """A process and others forked from it, which take the same step with other random draws.

    Parameters
    ----------
    step : callable
        Number of the step, data generator -> measures; adds to the gradients of ``parameters``.
    parameters : sequence of Parameter
        What is trained. Their memory becomes shared: updates must be in place.
    count : int
        Processes in all.
    seed : tuple of int
        Of what the others draw; what they draw in a step depends on its number alone, so that
        a run that is resumed goes on as it would have.
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter], count: int, seed: tuple[int, ...]) -> None:
        self._step, self._parameters, self._seed = step, parameters, seed
        for p in parameters if count > 1 else ():
            p.data = p.data.share_memory_()
        self._sizes = [p.numel() for p in parameters]
        self._gradients = torch.zeros(max(0, count - 1), sum(self._sizes)).share_memory_()
        context = multiprocessing.get_context("fork")  # images are in memory already, and stay there once
        self._others: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        for rank in range(1, count):
            here, there = context.Pipe()
            process = context.Process(target=self._work, args=(there, here, rank), daemon=True)
            process.start()
            there.close()
            self._others.append((process, here))

    def step(self, number: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Take a step in all processes: the gradients are the mean of theirs, the measures are this one's.

        Raises
        ------
        RuntimeError
            If another process failed, with its message, or was ended.
        """
        for _, pipe in self._others:
            pipe.send(number)
        seen = self._step(number, rng)
        for process, pipe in self._others:
            try:
                problem = pipe.recv()
            except EOFError:
                process.join()
                problem = f"ended with exit code {process.exitcode}"
            if problem:
                raise RuntimeError(f"a process of --processes failed: {problem}")
        if self._others:
            parts = self._gradients.sum(0).split(self._sizes)
            for p, rest in zip(self._parameters, parts, strict=True):
                own = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = own.add_(rest.view_as(p)).div_(1 + len(self._others))
        return seen

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, pipe in self._others:
            pipe.close()  # which ends them
            process.join(10)
            process.kill()
        self._others = []

    def _work(self, pipe: Connection, far: Connection, rank: int) -> None:
        """What another process does: a step for each number that comes."""
        far.close()  # it came along with the fork, and would keep the pipe open
        for number in (signal.SIGINT, signal.SIGTERM):  # the first process writes the checkpoint, then ends this one
            signal.signal(number, signal.SIG_IGN)
        for _, earlier in self._others:
            earlier.close()
        while True:
            try:
                step = pipe.recv()
            except EOFError:
                return
            try:
                for p in self._parameters:
                    p.grad = None
                torch.manual_seed(int(np.random.SeedSequence((*self._seed, rank, step)).generate_state(1)[0]))
                self._step(step, np.random.default_rng((*self._seed, rank, step)))
                flat = self._gradients[rank - 1]
                for p, part in zip(self._parameters, flat.split(self._sizes), strict=True):
                    part.zero_() if p.grad is None else part.copy_(p.grad.reshape(-1))
                problem = ""
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            with suppress(BrokenPipeError):  # the first process has given up on this step
                pipe.send(problem)
