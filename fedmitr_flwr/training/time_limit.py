"""A limit on how long a client may work, so that one that hangs costs nobody else."""

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
    """Raise in the block when it takes too long, and end the process when even that does not end it.

    The exception needs Python to run in the main thread. Code that hangs outside of Python, or a block in another
    thread, is ended from a thread of the interpreter's own, with the exit code 1 and a traceback on stderr.

    Parameters
    ----------
    seconds
        The limit; the process is ended `GRACE_SECONDS` later.
    what
        Subject of the message.

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
            if before[0] > 0:  # somebody else's alarm goes on
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
