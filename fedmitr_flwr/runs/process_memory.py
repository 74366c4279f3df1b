"""Memory of this process: its peak, and handing it back to the system."""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
import sys
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_OBJECT_STORE = "/plasma"  # in the name of the file behind Ray's shared memory


def release_memory() -> None:
    """Hand freed memory back to the system, and let go of what was read from Ray's object store.

    Glibc does not do the first by itself with blocks of uneven sizes. As to the second: each page of the store that was
    ever read counts as this process's memory until it is let go; what is read again comes back unchanged.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if _MAPS.exists():
        for start, length in _object_store(_MAPS.read_text()):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _object_store(maps: str) -> list[tuple[int, int]]:
    """Start and length of each shared mapping of Ray's object store, of which the kernel keeps the pages itself."""
    found = []
    for line in maps.splitlines():
        if _OBJECT_STORE in line and line.split()[1].endswith("s"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            found.append((start, end - start))
    return found


_STATUS = Path("/proc/self/status")


def peak_rss_mb() -> float:
    """Return the peak resident memory of this process in MiB.

    Linux says it of the program that runs; what `getrusage` says begins with the peak of the process that started it.
    """
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
