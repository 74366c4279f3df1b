"""Progress of a run, watched from outside: stages report events, listeners show or keep them.

An `Observer` is what the pipeline, the strategy and the server see. It logs one line of a tree for each event that a
person should read, adds up the seconds of each stage, and hands everything to its listeners (`listeners/`), which
write ``metrics.jsonl``, TensorBoard files or keep pictures for the report. Without listeners nothing is computed for
them.
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
    """Something that happened.

    Attributes
    ----------
    kind
        ``started`` and ``ended`` of a stage (``seconds``, ``peak_rss_mb`` and, on a GPU, ``cuda_peak_mb``);
        ``progress`` within it (``done`` of ``total``, losses and the same memory); ``note``, which is logged too;
        ``client``, what became of one client (``outcome``).
    stage
        Name of the stage, as in ``metrics.json``.
    seconds
        Since the observer was made.
    values
        Names and values.
    """

    kind: Kind
    stage: str
    seconds: float
    values: Mapping[str, Value | Sequence[Value]] = field(default_factory=dict)


class Listener:
    """What an observer tells of a run; a listener overrides what it wants to know."""

    def receive(self, event: Event) -> None:
        """Take an event."""

    def snapshot(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors to look at, on the device of the stage; they may change after the call."""

    def close(self) -> None:
        """Let go of files; nothing comes after it."""


class Observer:
    """Logs events, keeps the wall-clock seconds of each stage, and passes all on to listeners.

    Parameters
    ----------
    *listeners
        Called in order, in the thread of the stage.

    Attributes
    ----------
    seconds
        Of each stage that has ended at least once.
    """

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @property
    def watched(self) -> bool:
        """Whether anybody listens: what is computed for listeners alone can be left out otherwise."""
        return bool(self.listeners)

    def event(self, stage: str, **values: Value) -> None:
        """Report something that a person should read, as names and values."""
        shown = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items())
        log.info("├── %s: %s", stage, shown)
        self._tell("note", stage, values)

    def progress(self, stage: str, done: int, total: int, values: Callable[[], Mapping[str, Value]]) -> None:
        """Report how far a stage is.

        Parameters
        ----------
        done, total
            Steps.
        values
            Called only if anybody listens: reading a loss off a GPU makes the stage wait for it.
        """
        if self.listeners:
            self._tell("progress", stage, {"done": done, "total": total, **values(), **memory()})

    def client(self, outcome: str, **values: Value | Sequence[Value]) -> None:
        """Report what became of a client: ``accepted``, ``refused``, ``failed`` or ``empty``."""
        self._tell("client", "clients", {"outcome": outcome, **values})

    def snapshot(self, name: str, **tensors: Tensor) -> None:
        """Show tensors to the listeners."""
        for listener in self.listeners:
            listener.snapshot(name, tensors)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; a stage entered again adds to its seconds."""
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
    """Peak memory in MiB so far: of the process, and of torch on the GPU since the stage began."""
    found: dict[str, Value] = {"peak_rss_mb": round(peak_rss_mb(), 1)}
    if torch.cuda.is_available():
        found["cuda_peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return found


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
