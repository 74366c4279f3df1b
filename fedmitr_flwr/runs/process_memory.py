"""Measure the peak memory of this process, and return freed memory to the system."""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
import sys
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_OBJECT_STORE = "/plasma"  # part of the file name of Ray's shared memory


def release_memory() -> None:
    """Return freed memory to the system, and release the pages that were read from Ray's object store.

    Glibc does not return freed blocks of different sizes by itself. A page of the object store counts as memory of this
    process from its first read until its release; a later read gets it back unchanged.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if _MAPS.exists():
        for start, length in _object_store(_MAPS.read_text()):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _object_store(maps: str) -> list[tuple[int, int]]:
    """Return start and length of each shared mapping of Ray's object store; its content stays in the store."""
    found = []
    for line in maps.splitlines():
        if _OBJECT_STORE in line and line.split()[1].endswith("s"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            found.append((start, end - start))
    return found


_STATUS = Path("/proc/self/status")


def peak_rss_mb() -> float:
    """Return the peak resident memory of this process in MiB.

    On Linux the value of /proc is used, because that of `getrusage` includes the peak of the parent process.
    """
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
