"""Letting go of memory changes no content."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from fedmitr_flwr.runs.process_memory import release_memory


def resident_kb(name: str) -> int:
    """Resident memory of this process's mappings of a file."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(name)
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_read_from_the_object_store_are_let_go_and_come_back_unchanged(tmp_path: Path) -> None:
    size, path = 1 << 20, tmp_path / "plasma-test"
    path.write_bytes(bytes(size))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as shared:
        shared[:] = b"x" * size
        assert resident_kb(path.name) == size // 1024
        release_memory()
        assert resident_kb(path.name) == 0
        assert shared[:] == b"x" * size
