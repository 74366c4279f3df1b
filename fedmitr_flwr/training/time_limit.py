"""Time limit for the work of a client, so that a client that hangs does not block its process."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

GRACE_SECONDS = 15.0


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise an error in the block after `seconds`, and end the process if the block still runs `GRACE_SECONDS` later.

    The error can only be raised while the main thread runs Python code. If the block hangs in other code, or runs in
    another thread, only the end of the process applies: exit code 1, with a traceback on stderr.

    Parameters
    ----------
    seconds
        The limit.
    what
        Subject of the error message.

    Raises
    ------
    TimeoutError
        ``{what} took longer than {seconds} s``.
    """

    def expired(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{what} took longer than {seconds:g} s")

    file = sys.__stderr__ if _has_descriptor(sys.__stderr__) else None
    if file is not None:
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=file)
    in_main = threading.current_thread() is threading.main_thread()
    try:
        if not in_main:
            yield
            return
        handler = signal.signal(signal.SIGALRM, expired)
        before, start = signal.setitimer(signal.ITIMER_REAL, seconds), time.monotonic()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if before[0] > 0:  # restore an alarm that was set before
                signal.setitimer(signal.ITIMER_REAL, max(0.001, before[0] - (time.monotonic() - start)), before[1])
    finally:
        if file is not None:
            faulthandler.cancel_dump_traceback_later()


def _has_descriptor(stream: object) -> bool:
    try:
        stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    return True
