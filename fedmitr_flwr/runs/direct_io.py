"""Write large files without the kernel's page cache, if the file system supports it.

An upload is not read until all uploads have arrived. Filling the page cache with it takes pages from other processes,
and freeing them costs several times the copy itself: for 23 MB, 13 to 55 ms of a core with the cache and 3 ms without.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 4096  # a direct write needs a memory address, position and length that are multiples of it
_BUFFER = 4 * 2**20
_DIRECT = getattr(os, "O_DIRECT", 0)  # exists on Linux
_FREE: list[mmap.mmap] = []  # buffers for reuse: allocating one costs more than writing it to the disk


class UncachedFile:
    """Writes an empty file from its beginning to its end.

    Parameters
    ----------
    descriptor
        Descriptor of the open, empty file, with or without O_DIRECT.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        try:
            self._buffer = _FREE.pop()
        except IndexError:
            self._buffer = mmap.mmap(-1, _BUFFER)  # starts at a page boundary
        self._filled = 0
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes.

        Raises
        ------
        OSError
            If they cannot be written.
        """
        rest = memoryview(data)
        self._size += len(rest)
        while rest:
            piece = rest[: _BUFFER - self._filled]
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            rest = rest[len(piece) :]
            if self._filled == _BUFFER:
                self._flush()

    def finish(self) -> None:
        """Write the rest in whole blocks, and truncate the file to its size."""
        self._filled += -self._filled % _BLOCK
        self._flush()
        os.ftruncate(self._descriptor, self._size)
        _FREE.append(self._buffer)

    def _flush(self) -> None:
        with memoryview(self._buffer) as buffer:
            start = 0
            while start < self._filled:
                start += self._write_some(buffer[start : self._filled])
        self._filled = 0

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            # Some file systems accept the flag, but need larger blocks or refuse direct writes. A short write also ends
            # here.
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            return os.write(self._descriptor, data)


@contextmanager
def open_uncached(path: Path) -> Iterator[UncachedFile]:
    """Create or empty a file and yield it for writing; after the block the file is complete but not synced.

    Raises
    ------
    OSError
        If the file cannot be created or written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = os.open(path, flags, 0o666)
    try:
        file = UncachedFile(descriptor)
        yield file
        file.finish()
    finally:
        os.close(descriptor)
