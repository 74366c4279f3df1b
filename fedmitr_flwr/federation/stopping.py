"""A run that is ended from outside: by ``flwr stop``, by a signal, or because its SuperLink is gone."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.supercore.exit import add_exit_handler

# Seconds that Flower's exit waits for the block to end; a step of any stage takes less.
_PATIENCE = 10.0


class RunStopped(SystemExit):
    """Flower ends the process that this run is in."""


@contextmanager
def stopped_with_flower() -> Iterator[None]:
    """Raise `RunStopped` in the block when Flower ends its process.

    The ServerApp of a simulation is a thread, which Flower 1.41 lets run for some seconds while it ends the workers. It
    would take their clients for failed and close the collection without them, so it must stop first. A ServerApp in
    the main thread, as in a deployment, is left by Flower's own `SystemExit`.
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
