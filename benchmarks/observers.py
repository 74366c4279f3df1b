"""Measure what watching a run costs: CPU time of the server's stages with and without listeners.

    python -m benchmarks.observers conf/demo.toml

Clients are trained once and cached. Then the stages run on their uploads, repeatedly and in three ways that alternate:

- ``off``: without listeners.
- ``on``: with the listeners that every run has (metrics.jsonl, and pictures for the report).
- ``boards``: as ``on``, with TensorBoard.

Each run gives two numbers: the CPU seconds of all threads, and the CPU seconds inside the observer (reading losses,
measuring agreement, copying pictures, writing files). The second number is exact even if the machine does other work;
differences of the first need a quiet machine. Results are written to ``benchmarks/results/observers.json``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.federation import Federation, train_federation
from fedmitr_flwr.launch.settings_files import run_settings
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.runs.jsonl import JsonLines
from fedmitr_flwr.runs.observer import Listener, Observer, Value
from fedmitr_flwr.runs.snapshots import Keeper
from fedmitr_flwr.runs.tensorboard import TensorBoard
from fedmitr_flwr.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, Callable[[Path], list[Listener]]] = {
    "off": lambda folder: [],
    "on": lambda folder: [JsonLines(folder / "metrics.jsonl"), Keeper()],
    "boards": lambda folder: [JsonLines(folder / "metrics.jsonl"), Keeper(), TensorBoard(folder / "tensorboard")],
}


class TimedObserver(Observer):
    """An observer that measures the CPU seconds that the stages spend in it."""

    def __init__(self, *listeners: Listener) -> None:
        super().__init__(*listeners)
        self.inside = 0.0

    def event(self, stage: str, **values: Value) -> None:
        with self._timed():
            super().event(stage, **values)

    def progress(self, stage: str, done: int, total: int, values: Callable[[], Mapping[str, Value]]) -> None:
        with self._timed():
            super().progress(stage, done, total, values)

    def snapshot(self, name: str, **tensors: Tensor) -> None:
        with self._timed():
            super().snapshot(name, **tensors)

    def close(self) -> None:
        with self._timed():
            super().close()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            self.inside += time.process_time() - start


def main(
    conf: Annotated[Path, typer.Argument(help="settings file (TOML)")],
    change: Annotated[list[str] | None, typer.Option("--set", help="key=value; overrides CONF")] = None,
    clients: Annotated[int, typer.Option(help="number of clients K")] = 10,
    ways: Annotated[str, typer.Option(help="ways of watching, separated by commas; they alternate")] = ",".join(WAYS),
    repeats: Annotated[int, typer.Option(min=1, help="repetitions of each way")] = 3,
    cache: Annotated[Path, typer.Option(help="folder for trained uploads")] = Path("outputs/uploads-cache"),
    results: Annotated[Path, typer.Option(help="JSON file to write")] = ROOT
    / "benchmarks"
    / "results"
    / "observers.json",
) -> None:
    """Measure, print one line per run, and write the summary."""
    settings = run_settings(ROOT, conf, change or [])
    federation = train_federation(settings, clients, cache)
    chosen = ways.split(",")
    totals: dict[str, list[float]] = {way: [] for way in chosen}
    inside: dict[str, list[float]] = {way: [] for way in chosen}
    for repeat in range(repeats):
        first = repeat % len(chosen)
        for way in chosen[first:] + chosen[:first]:  # another way is first in each repetition
            total, within = watch(federation, settings, WAYS[way])
            print(f"{repeat} {way}: {total:.2f} CPU s, {within:.3f} of them in the observer", flush=True)
            totals[way].append(total)
            inside[way].append(within)
    found = summarise(totals, inside)
    about = {"conf": str(conf), "set": change or [], "clients": clients, "hardware": hardware()}
    results.write_text(json.dumps({**about, **found}, indent=2) + "\n")
    print(json.dumps(found))


def watch(federation: Federation, settings: Settings, make: Callable[[Path], list[Listener]]) -> tuple[float, float]:
    """Run the stages once; return the CPU seconds of the process and those inside the observer."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        observer = TimedObserver(*make(Path(folder)))
        METHODS[settings.run.method](federation.inputs(settings, observer=observer))
        observer.close()
        return time.process_time() - start, observer.inside


def summarise(totals: Mapping[str, list[float]], inside: Mapping[str, list[float]]) -> dict[str, dict[str, object]]:
    """Return for each way its seconds, the percentage inside the observer, and the excess over ``off`` in percent."""
    base = statistics.median(totals["off"]) if "off" in totals else None
    return {
        way: {
            "cpu_seconds": [round(value, 2) for value in values],
            "inside_seconds": [round(value, 3) for value in inside[way]],
            "inside_percent": round(100 * sum(inside[way]) / sum(values), 3),
            "over_off_percent": None if base is None else round(100 * (statistics.median(values) / base - 1), 2),
        }
        for way, values in totals.items()
    }


def hardware() -> str:
    """Return the description of this machine."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, CPU"


if __name__ == "__main__":
    typer.run(main)
