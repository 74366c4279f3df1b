"""Memory of this process."""

from __future__ import annotations

import ctypes


def release_memory() -> None:
    """Hand freed memory back to the system, which glibc does not do by itself with blocks of uneven sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
