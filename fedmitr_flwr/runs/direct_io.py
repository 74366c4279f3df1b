"""Large files written past the kernel's page cache, where the file system lets us.

An upload is not read again before all have come. To fill pages with it that other processes could use, and to clean
them up later, costs several times what the copy itself does: 13 to 55 ms of a core for 23 MB, against 3 ms this way.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 4096  # memory, position and length of a direct write are multiples of it
_BUFFER = 4 * 2**20
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux's
_FREE: list[mmap.mmap] = []  # buffers to use again: fresh memory costs more than what is written from it


class UncachedFile:
    """An empty file to write from its begin to its end.

    Parameters
    ----------
    descriptor
        Of the open, empty file, with or without O_DIRECT.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        try:
            self._buffer = _FREE.pop()
        except IndexError:
            self._buffer = mmap.mmap(-1, _BUFFER)  # begins at a page
        self._filled = 0
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes.

        Raises
        ------
        OSError
            If the disk refuses them.
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
        """Write what is left, in whole blocks, and cut the file to its size."""
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
            # File systems that take the flag and then want larger blocks, or none of it; also after a short write.
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            return os.write(self._descriptor, data)


@contextmanager
def open_uncached(path: Path) -> Iterator[UncachedFile]:
    """Make a file, or empty one, and give it to write to; it is complete, not synced, when the block has ended.

    Raises
    ------
    OSError
        If it cannot be made or written.
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
