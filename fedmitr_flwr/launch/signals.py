"""Turn signals that end a command into an exception, so that the command cleans up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self

_Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupted(BaseException):
    """A signal asked to end the run."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


class Signals:
    """Raise `Interrupted` at the first SIGINT, SIGTERM or SIGHUP, and ignore further ones during the cleanup."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._raising = False
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only; in another thread, the caller handles signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise `Interrupted` in this block, also for a signal that arrived before it."""
        self._raising = True
        try:
            if self._number is not None:
                raise Interrupted(self._number)
            yield
        finally:
            self._raising = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._number is None:
            self._number = number
            if self._raising:
                raise Interrupted(number)
