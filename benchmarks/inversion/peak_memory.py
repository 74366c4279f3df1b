"""The highest memory of this process since a moment, as Linux counts it."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import psutil

from fedmitr_flwr.runs.process_memory import release_memory

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """MiB above what is resident now; on other systems than Linux above the highest so far, if it was higher."""

    def __init__(self) -> None:
        release_memory()
        self._before = psutil.Process().memory_info().rss
        if _RESET.exists():
            _RESET.write_text("5")

    @property
    def extra(self) -> float:
        """Of the highest since the start."""
        return float(self.highest - self._before / 2**20)

    @property
    def highest(self) -> float:
        """In all."""
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
        return int(found[1] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024
