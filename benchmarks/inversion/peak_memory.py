"""Measure the peak resident memory of this process since a given moment, as Linux counts it."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import psutil

from fedmitr_flwr.runs.process_memory import release_memory

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Peak memory since the creation of this object, in MiB.

    On systems other than Linux the peak cannot be reset, so it includes earlier peaks.
    """

    def __init__(self) -> None:
        release_memory()
        self._before = psutil.Process().memory_info().rss
        if _RESET.exists():
            _RESET.write_text("5")

    @property
    def extra(self) -> float:
        """Peak minus the memory that was resident at the start."""
        return float(self.highest - self._before / 2**20)

    @property
    def highest(self) -> float:
        """Peak in total."""
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
        return int(found[1] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024
