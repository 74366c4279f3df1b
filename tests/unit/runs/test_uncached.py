"""Files written past the page cache hold what was written, also where the file system does not take part."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmitr_flwr.runs.direct_io import open_uncached

SIZES = [0, 1, 4095, 4096, 4097, 4 * 2**20, 4 * 2**20 + 1, 9_000_001]


def written(path: Path, data: bytes) -> bytes:
    """Write data in pieces of uneven lengths, and read it back."""
    with open_uncached(path) as file:
        for start in range(0, len(data), 1_234_567):
            file.write(memoryview(data)[start : start + 1_234_567])
    return path.read_bytes()


@pytest.mark.parametrize("size", SIZES)
def test_a_file_holds_what_was_written(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    assert written(tmp_path / "file", data) == data


def test_what_a_killed_process_left_under_the_name_is_overwritten(tmp_path: Path) -> None:
    written(tmp_path / "file", os.urandom(100_000))
    assert written(tmp_path / "file", b"short") == b"short"


@pytest.fixture(params=["flag refused", "first write refused", "later write refused"])
def reluctant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that wants nothing of direct writes, and says so at one moment or another."""
    open_, write, calls = os.open, os.write, [0]

    def refuse(call: Callable[..., int], refused: Callable[[int], bool]) -> Callable[..., int]:
        def refusing(*arguments: object) -> int:
            calls[0] += 1
            if refused(calls[0]):
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(*arguments)

        return refusing

    if request.param == "flag refused":
        monkeypatch.setattr(os, "open", refuse(open_, lambda call: call == 1))
    else:
        turn = 1 if request.param == "first write refused" else 2
        monkeypatch.setattr(os, "write", refuse(write, lambda call: call == turn))


@pytest.mark.usefixtures("reluctant")
def test_a_file_system_without_direct_writes_gets_usual_ones(tmp_path: Path) -> None:
    data = os.urandom(9_000_001)
    assert written(tmp_path / "file", data) == data


def test_writes_that_take_only_a_part_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:8192]))
    data = os.urandom(100_001)
    assert written(tmp_path / "file", data) == data


def test_other_errors_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "other", b"x" * 10_000)
