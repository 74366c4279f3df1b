"""Progress of the pipeline, watched from outside: stages report events, an observer shows them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("fedmitr.pipeline")

Value = float | int | str


class Observer:
    """Logs each event as one line of a tree and keeps the wall-clock seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def event(self, stage: str, **values: Value) -> None:
        """Report something that happened in a stage, as names and values."""
        shown = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items())
        log.info("├── %s: %s", stage, shown)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; a stage entered again adds to its seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
