"""What to do when a batch does not fit into memory: half of it may."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

# torch has a class of its own for CUDA only; its CPU allocator raises RuntimeError with this in the message.
MESSAGES = ("out of memory", "not enough memory", "can't allocate memory")


def in_halves(run: Callable[[Sequence[Job]], Sequence[Result]]) -> Callable[[Sequence[Job]], list[Result]]:
    """Return `run` for batches that may not fit into memory: where it runs out, each half goes alone.

    Parameters
    ----------
    run : callable
        Takes a sequence of jobs, returns their results in order.

    Returns
    -------
    callable
        The same, that raises for want of memory only if a single job does not fit.
    """

    def halves(jobs: Sequence[Job]) -> list[Result]:
        try:
            return list(run(jobs))
        except Exception as error:
            if len(jobs) < 2 or not is_out_of_memory(error):
                raise
        # Here and not above: while the exception lives, its traceback holds the tensors that filled the memory.
        release()
        middle = (len(jobs) + 1) // 2
        return halves(jobs[:middle]) + halves(jobs[middle:])

    return halves


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device or the machine has no more memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in MESSAGES)
    )


def release() -> None:
    """Give back what torch keeps of the device's memory for later use: in small pieces it fits no large tensor."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
