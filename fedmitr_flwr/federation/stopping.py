"""Stop a run whose process Flower ends: after ``flwr stop``, a signal, or the end of its SuperLink."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.supercore.exit import add_exit_handler

# Seconds for which Flower's exit waits until the run has stopped. A step of any stage takes less.
_PATIENCE = 10.0


class RunStopped(SystemExit):
    """Flower ends the process of this run."""


@contextmanager
def stopped_with_flower() -> Iterator[None]:
    """Raise `RunStopped` inside the block when Flower ends the process.

    In a simulation the ServerApp is a thread. Flower lets it run for some seconds while it ends the workers. In that
    time the ServerApp would count the workers' clients as failed and close the collection without them, so it is
    stopped first. In a deployment the ServerApp is in the main thread, where Flower raises `SystemExit` itself.
    """
    if threading.current_thread() is threading.main_thread():
        yield
        return
    thread, ended, lock = threading.get_ident(), threading.Event(), threading.Lock()

    def stop() -> None:
        with lock:
            if ended.is_set():
                return
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(RunStopped))
        ended.wait(_PATIENCE)

    add_exit_handler(stop, run_before_force_exit=True)
    try:
        yield
    finally:
        with lock:
            ended.set()
