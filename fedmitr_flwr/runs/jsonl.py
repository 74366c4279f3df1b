"""Write and read ``metrics.jsonl``: one line of JSON for each event, for the live view, the report and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fedmitr_flwr.runs.observer import Event, Listener


class JsonLines(Listener):
    """Appends each event to a file as one line ``{"kind", "stage", "seconds", ...values}``.

    Parameters
    ----------
    path
        The file. Lines that an earlier process of the same run wrote are kept.
    """

    def __init__(self, path: Path) -> None:
        # Line-buffered, so that readers see each event at once and a killed process loses no event.
        self._file: IO[str] = path.open("a", encoding="utf-8", buffering=1)

    def receive(self, event: Event) -> None:
        """Write an event as one line; numbers that are not finite are written as null."""
        # The duration of a stage, which the event has under ``seconds``, is written as ``took``.
        values = {("took" if name == "seconds" else name): value for name, value in event.values.items()}
        record = {"kind": event.kind, "stage": event.stage, "seconds": event.seconds, **values}
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a ``metrics.jsonl``; incomplete lines are skipped, and a missing file has no events."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "kind" in record and "stage" in record:
                yield record


def _plain(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
