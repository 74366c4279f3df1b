"""One live view of a run in a terminal, from the events that the ServerApp writes to the run's directory.

The ServerApp runs in a process of Flower's; its log comes late and as text. ``metrics.jsonl`` tells the same at once,
in numbers, so the view follows that file. It needs no more than the file: any run on this machine can be watched.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

STAGES = {
    "clients": "Clients train",
    "invert": "Inversion",
    "relabel": "Relabeling",
    "distill": "Distillation",
    "evaluate": "Evaluation",
}
_SHOWN = {
    "loss": "loss",
    "confidence": "p(y)",
    "kl": "KL",
    "ce": "CE",
    "agreement": "agreement",
    "global": "accuracy of the global model",
}


@dataclass
class StageState:
    """How far one stage is; times on the run's clock."""

    started: float | None = None
    ended: float | None = None
    done: int = 0
    total: int = 0
    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None
    values: dict[str, float] = field(default_factory=dict)

    def rate(self) -> float | None:
        """Steps a second between the first report and the last: what comes before the first step doesn't count."""
        if self.first is None or self.last is None or self.started is None:
            return None
        (begun, before), (clock, done) = self.first, self.last
        if done == before:
            begun, before = self.started, 0
        return (done - before) / max(clock - begun, 1e-6)


class RunState:
    """What the events so far say of a run.

    Attributes
    ----------
    stages
        By name, in order.
    asked, accepted, refused, failed, empty
        Clients.
    memory_mb
        Peak memory of the ServerApp's process; 0 if not known yet.
    clock
        Seconds of the last event on the run's clock.
    """

    def __init__(self) -> None:
        self.stages = {name: StageState() for name in STAGES}
        self.asked = self.accepted = self.refused = self.failed = self.empty = 0
        self.memory_mb = 0.0
        self.clock = 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event of ``metrics.jsonl``."""
        self.clock = float(event.get("seconds", self.clock))
        self.memory_mb = float(event.get("peak_rss_mb") or self.memory_mb)
        if event["kind"] == "client":
            self._client(event)
        stage = self.stages.get(event["stage"])
        if stage is None:
            return
        if event["kind"] == "started":
            stage.started, stage.ended, stage.done, stage.first = self.clock, None, 0, None
            if event["stage"] != "clients" and self.stages["clients"].ended is None:
                self.stages["clients"].ended = self.clock
        elif event["kind"] == "ended":
            stage.ended = self.clock
        elif event["kind"] == "progress":
            stage.done, stage.total = int(event["done"]), int(event["total"])
            stage.last = (self.clock, stage.done)
            stage.first = stage.first or stage.last
            stage.values |= {name: event[name] for name in _SHOWN if event.get(name) is not None}

    def _client(self, event: Mapping[str, Any]) -> None:
        outcome, clients = event.get("outcome"), self.stages["clients"]
        if outcome == "asked":
            self.asked, self.accepted, self.refused, self.failed, self.empty = int(event["count"]), 0, 0, 0, 0
            clients.started, clients.ended, clients.total = self.clock, None, self.asked
        elif outcome in ("accepted", "refused", "failed", "empty"):
            setattr(self, outcome, getattr(self, outcome) + 1)
        elif outcome == "silent":
            self.failed += int(event["count"])
        clients.done = self.accepted + self.refused + self.failed + self.empty


def render_state(state: RunState, now: float) -> RenderableType:
    """Draw the stages as a table, `now` on the run's clock."""
    table = Table.grid(padding=(0, 2))
    for _ in range(5):
        table.add_column(no_wrap=True)
    for name, title in STAGES.items():
        stage = state.stages[name]
        running = stage.started is not None and stage.ended is None
        over = stage.ended is not None
        mark = Text("●", "bold cyan") if running else Text("✓", "green") if over else Text("·", "dim")
        head = Text(title, "bold" if running else "" if over else "dim")
        table.add_row(mark, head, _bar(stage), _times(stage, now), _numbers(state, name, stage))
    foot = f"{_clock(now)} since the start" + (f", peak memory {state.memory_mb:,.0f} MiB" if state.memory_mb else "")
    return Group(table, Text(foot, "dim"))


def _bar(stage: StageState) -> RenderableType:
    if not stage.total or stage.started is None:
        return Text("")
    return ProgressBar(total=stage.total, completed=stage.total if stage.ended else stage.done, width=24)


def _times(stage: StageState, now: float) -> Text:
    if stage.started is None:
        return Text("")
    if stage.ended is not None:
        return Text(_clock(stage.ended - stage.started), "dim")
    rate, elapsed = stage.rate(), now - stage.started
    if rate is None and stage.done:  # clients, whose answers come at any time
        return Text(f"{_clock(elapsed)}, {_clock(elapsed * (stage.total / stage.done - 1))} left")
    if not rate or not stage.total:
        return Text(_clock(elapsed))
    return Text(f"{rate:.3g} it/s, {_clock((stage.total - stage.done) / rate)} left")


def _numbers(state: RunState, name: str, stage: StageState) -> Text:
    if name != "clients":
        return Text(", ".join(f"{_SHOWN[key]} {value:.3g}" for key, value in stage.values.items()))
    counts = f"{state.accepted} of {state.asked} in" if state.asked else ""
    lost = [(state.refused, "refused"), (state.failed, "failed"), (state.empty, "without data")]
    return Text(", ".join([counts, *(f"{number} {what}" for number, what in lost if number)]).strip(", "))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"


class LiveView:
    """Context manager that shows a run's stages below its log.

    Parameters
    ----------
    events
        The run's ``metrics.jsonl``, which may not be there yet; one that is older than the view is not read.
    console
        Where to draw.
    """

    def __init__(self, events: Path, console: Console) -> None:
        self.state = RunState()
        self._events, self._console = events, console
        self._file: IO[str] | None = None
        self._rest = ""
        self._opened = time.time()
        self._heard = time.monotonic()
        self._lock = threading.Lock()
        # rich redraws from a thread of its own and asks for the picture each time.
        self._live = Live(console=console, refresh_per_second=4, transient=False, get_renderable=self._draw)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._file is not None:
            self._file.close()

    def echo(self, line: str) -> None:
        """Print a line of the log above the view."""
        self._console.print(Text.from_ansi(line), soft_wrap=True, highlight=False)

    def _draw(self) -> RenderableType:
        with self._lock:
            self._read()
            waited = time.monotonic() - self._heard if self.state.clock else 0.0
            return render_state(self.state, self.state.clock + waited)

    def _read(self) -> None:
        if self._file is None:
            try:
                if self._events.stat().st_mtime < self._opened:
                    return
                self._file = self._events.open(encoding="utf-8", errors="replace")
            except OSError:
                return
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            try:
                self.state.take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
            self._heard = time.monotonic()
