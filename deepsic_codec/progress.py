"""The one signature of progress callbacks."""

from collections.abc import Callable

#: What functions take as `progress`. They call `progress(done, total)`, in the thread that called them, with the number
#: of steps that are done and the number of all steps.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Report nothing."""
