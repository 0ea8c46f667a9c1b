"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupt:
    """Context that turns Ctrl-C and SIGTERM into the flag `requested`; a second signal stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            signals = signal.SIGINT, signal.SIGTERM
            self._handlers = {number: signal.signal(number, self._request) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
