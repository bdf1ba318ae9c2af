"""SIGINT and SIGTERM as a question that a loop asks, so that a run stops where it is safe to."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def listen(self) -> None:
        """Put our handlers in place; to be called again after ``ray.init``, which replaces SIGTERM's."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:  # asked twice: at once, then
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def listening() -> Iterator[Stop]:
    """A :class:`Stop` for the length of a ``with``; outside the main thread it never hears anything."""
    stop = Stop()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    stop.listen()
    try:
        yield stop
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
