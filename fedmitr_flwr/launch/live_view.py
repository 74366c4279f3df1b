"""Show a run's stages in a terminal, from the events that the ServerApp writes to the run's directory.

The ServerApp runs in one of Flower's processes, and its log reaches the terminal late and as text. The file
``metrics.jsonl`` holds the same events at once and as numbers, so the view reads that file and needs nothing else.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

STAGES = {
    "clients": "Client training",
    "invert": "Inversion",
    "relabel": "Relabeling",
    "distill": "Distillation",
    "evaluate": "Evaluation",
}
_SHOWN = {
    "loss": "loss",
    "confidence": "confidence",
    "kl": "KL",
    "ce": "CE",
    "agreement": "agreement with the ensemble",
    "global": "accuracy of the global model",
}
_WAITING, _RUNNING, _ENDED = "[dim]·", "[bold cyan]●", "[green]✓"
_LOST = {"refused": "refused", "failed": "failed", "empty": "without data"}


class RunState:
    """A run's stages as tasks of `rich.progress`, updated from the run's events.

    Attributes
    ----------
    progress
        One task a stage, with a bar, times and the latest values. Its times are seconds since the start of the run.
        Its field ``took`` is the duration of a stage that has ended; ``steady`` says whether steps take equal times,
        which a client's training does not.
    counts
        Number of clients by outcome. ``asked`` is the number of clients that were asked to train.
    memory_mb
        Peak memory of the ServerApp's process in MiB; 0 before the first event that reports it.
    clock
        Time of the last event, in seconds since the start of the run.
    """

    def __init__(self) -> None:
        self.memory_mb = self.clock = self._now = 0.0
        self.counts = dict.fromkeys(("asked", "accepted", *_LOST), 0)
        self.progress = Progress(
            TextColumn("{task.fields[mark]}"),
            TextColumn("{task.description}"),
            _Bar(bar_width=24),
            _Times(),
            TextColumn(" {task.fields[values]}", markup=False),
            speed_estimate_period=math.inf,  # inversion alternates between slow and fast iterations
            get_time=lambda: self._now,
        )
        fields: dict[str, Any] = {"mark": _WAITING, "values": "", "took": None}
        self._values: dict[str, dict[str, float]] = {name: {} for name in STAGES}
        self._tasks = {
            name: self.progress.add_task(f"[dim]{title}", False, None, steady=name != "clients", **fields)
            for name, title in STAGES.items()
        }

    def take(self, event: Mapping[str, Any]) -> None:
        """Update the tasks with one event of ``metrics.jsonl``."""
        self.clock = self._now = float(event.get("seconds", self.clock))
        self.memory_mb = float(event.get("peak_rss_mb") or self.memory_mb)
        kind, name = event["kind"], event["stage"]
        if kind == "client":
            self._client(event)
        elif name not in self._tasks:
            return
        elif kind == "started":
            if self._task("clients").started:
                self._end("clients")
            self._start(name)
        elif kind == "ended":
            self._end(name)
        elif kind == "progress":
            values = self._values[name]  # not every event has all of them
            values.update({key: event[key] for key in _SHOWN if event.get(key) is not None})
            text = ", ".join(f"{_SHOWN[key]} {value:.3g}" for key, value in values.items())
            self._update(name, total=int(event["total"]), completed=int(event["done"]), values=text)

    def draw(self, now: float) -> RenderableType:
        """Draw all stages at the time `now`, in seconds since the start of the run."""
        self._now = now
        memory = f", peak memory of the server process {self.memory_mb:,.0f} MiB" if self.memory_mb else ""
        return Group(self.progress.get_renderable(), Text(f"{_clock(now)} since the start of the run{memory}", "dim"))

    def _client(self, event: Mapping[str, Any]) -> None:
        outcome, count = event.get("outcome"), int(event.get("count", 1))
        if outcome == "asked":
            self.counts = {**dict.fromkeys(self.counts, 0), "asked": count}
            self._start("clients")
        elif outcome == "silent":
            self.counts["failed"] += count
        elif outcome in self.counts:
            self.counts[outcome] += 1
        asked, accepted = self.counts["asked"], self.counts["accepted"]
        lost = [f"{self.counts[key]} {shown}" for key, shown in _LOST.items() if self.counts[key]]
        done = accepted + sum(self.counts[key] for key in _LOST)
        text = ", ".join([f"{accepted} of {asked} accepted", *lost])
        self._update("clients", total=asked, completed=done, values=text)

    def _start(self, name: str) -> None:
        self.progress.reset(self._tasks[name], description=f"[bold]{STAGES[name]}")
        self._update(name, mark=_RUNNING, values="", took=None)
        self._values[name].clear()

    def _update(self, name: str, **changes: Any) -> None:
        self.progress.update(self._tasks[name], **changes)

    def _end(self, name: str) -> None:
        task = self._task(name)
        if task.fields["took"] is None:
            total, took = task.total or 1, task.elapsed or 0.0
            self._update(name, total=total, completed=total, description=STAGES[name], mark=_ENDED, took=took)

    def _task(self, name: str) -> Task:
        return self.progress.tasks[self._tasks[name]]


class _Bar(BarColumn):
    """Bar of a stage that has started."""

    def render(self, task: Task) -> Any:
        return super().render(task) if task.started else Text("")


class _Times(ProgressColumn):
    """Duration of a stage that has ended; elapsed time, speed and time left of a running stage."""

    def render(self, task: Task) -> Text:
        if task.elapsed is None:
            return Text("")
        if task.fields["took"] is not None:
            return Text(_clock(task.fields["took"]), "dim")
        # rich's speed starts at the first report, which excludes warm-up and what a resumed stage had done before.
        speed = task.speed if task.fields["steady"] else None
        parts = [_clock(task.elapsed), f"{speed:.3g} it/s" if speed else ""]
        speed = speed or task.completed / max(task.elapsed, 1e-6)
        if task.remaining is not None and speed:
            parts.append(f"{_clock(task.remaining / speed)} left")
        return Text(", ".join(filter(None, parts)))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"


class LiveView:
    """Context manager that shows a run's stages below its log.

    Parameters
    ----------
    events
        The run's ``metrics.jsonl``. It may appear later. A file that was last changed before the view was made
        belongs to an earlier run and is not read.
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
        # rich redraws from its own thread and calls `_draw` each time.
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
            return self.state.draw(self.state.clock + waited)

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
