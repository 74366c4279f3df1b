"""Events of a run: the stages report them to an observer, which passes them to listeners.

The pipeline, the strategy and the server call an `Observer`. It writes a log line for each event that a person should
read, adds up the seconds of each stage, and passes everything to its listeners: `JsonLines` writes ``metrics.jsonl``,
`TensorBoard` writes event files, and `Keeper` keeps tensors for the report's pictures. Without listeners no values are
computed for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedmitr_flwr.runs.process_memory import peak_rss_mb

log = logging.getLogger("fedmitr.pipeline")

Value = float | int | str
Kind = Literal["started", "ended", "progress", "note", "client"]


@dataclass(frozen=True)
class Event:
    """An event of a run.

    Attributes
    ----------
    kind
        ``started``: a stage has started. ``ended``: a stage has ended, with ``seconds``, ``peak_rss_mb`` and, on a GPU,
        ``cuda_peak_mb``. ``progress``: progress of a stage, with ``done``, ``total``, losses and the same memory
        values. ``note``: values that are also logged. ``client``: the ``outcome`` of one client.
    stage
        Name of the stage, as in ``metrics.json``.
    seconds
        Seconds from the creation of the observer to the event.
    values
        Values of the event by name.
    """

    kind: Kind
    stage: str
    seconds: float
    values: Mapping[str, Value | Sequence[Value]] = field(default_factory=dict)


class Listener:
    """Base class of listeners; a listener overrides the methods that it needs."""

    def receive(self, event: Event) -> None:
        """Receive an event."""

    def snapshot(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Receive tensors on the device of the stage; they may change after the call."""

    def close(self) -> None:
        """Close all files; no other method is called after this one."""


class Observer:
    """Logs events, measures the wall-clock seconds of each stage, and passes both to listeners.

    Parameters
    ----------
    *listeners
        Listeners, called in this order and in the thread of the stage.

    Attributes
    ----------
    seconds
        Total seconds of each stage that has ended at least once.
    """

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @property
    def watched(self) -> bool:
        """Whether there are listeners; otherwise values for listeners need not be computed."""
        return bool(self.listeners)

    def event(self, stage: str, **values: Value) -> None:
        """Log values by name and pass them to the listeners as a ``note``."""
        shown = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items())
        log.info("├── %s: %s", stage, shown)
        self._tell("note", stage, values)

    def progress(self, stage: str, done: int, total: int, values: Callable[[], Mapping[str, Value]]) -> None:
        """Report the progress of a stage.

        Parameters
        ----------
        stage
            Name of the stage.
        done, total
            Number of finished steps and of all steps.
        values
            Function that returns further values. It is called only if there are listeners, because reading a loss from
            a GPU makes the stage wait for the GPU.
        """
        if self.listeners:
            self._tell("progress", stage, {"done": done, "total": total, **values(), **memory()})

    def client(self, outcome: str, **values: Value | Sequence[Value]) -> None:
        """Report the outcome of a client: ``accepted``, ``refused``, ``failed`` or ``empty``."""
        self._tell("client", "clients", {"outcome": outcome, **values})

    def snapshot(self, name: str, **tensors: Tensor) -> None:
        """Pass tensors to the listeners."""
        for listener in self.listeners:
            listener.snapshot(name, tensors)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the time of a stage; repeated stages of one name add up."""
        if torch.cuda.is_available() and self.listeners:
            torch.cuda.reset_peak_memory_stats()
        self._tell("started", name, {})
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self._tell("ended", name, {"seconds": round(seconds, 3), **memory()} if self.listeners else {})

    def close(self) -> None:
        """Close all listeners."""
        for listener in self.listeners:
            listener.close()

    def _tell(self, kind: Kind, stage: str, values: Mapping[str, Value | Sequence[Value]]) -> None:
        if self.listeners:
            event = Event(kind, stage, round(time.perf_counter() - self._start, 3), values)
            for listener in self.listeners:
                listener.receive(event)


def memory() -> dict[str, Value]:
    """Return the peak memory in MiB: of the process so far, and of torch on the GPU since the stage started."""
    found: dict[str, Value] = {"peak_rss_mb": round(peak_rss_mb(), 1)}
    if torch.cuda.is_available():
        found["cuda_peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return found


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
