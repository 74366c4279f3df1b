"""The directory of a run: its path, its files, its state and its log."""

from __future__ import annotations

import fcntl
import logging
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fedmitr_flwr.runs.atomic import TEMPORARY_SUFFIX, Json, write_json
from fedmitr_flwr.runs.log import LIBRARY_LOGGER, file_log
from fedmitr_flwr.settings import SettingsError
from fedmitr_flwr.settings.home import expand

STATUS = "status.json"
METRICS = "metrics.json"
CONFIG = "config.json"
LOG = "log.txt"
SYNTHETIC = "synthetic.png"
EVENTS = "metrics.jsonl"
REPORT_DATA, REPORT_PICTURES, REPORT = "report.json", "report.safetensors", "report.html"
TENSORBOARD = "tensorboard"
MODEL = "model"
UPLOADS = "uploads"
CHECKPOINTS = "checkpoints"
UPLOADED = f"{UPLOADS}/round-*/*.safetensors"
COLLECTED = "collected.json"
INITIAL = f"{CHECKPOINTS}/initial.safetensors"

_LOCK = ".lock"
_STOPPED = "stopped from outside: by flwr stop, a signal or the end of Flower's SuperLink"
_OWN_FILES: tuple[str, ...] = (STATUS, METRICS, CONFIG, LOG, SYNTHETIC, EVENTS, REPORT_DATA, REPORT_PICTURES, REPORT)
_OWN_FILES += tuple(f"{MODEL}/{name}" for name in ("model.safetensors", "config.json", "README.md"))
_OWN_PATTERNS = (
    f"{UPLOADS}/round-*/{COLLECTED}",
    f"{TENSORBOARD}/events.out.tfevents.*",
)
_CHECKPOINT_PATTERNS = (
    INITIAL,
    f"{CHECKPOINTS}/round-*/*.safetensors",
    f"{CHECKPOINTS}/round-*/*.pt",
)
_TEMPORARY_PATTERNS = tuple(
    f"{folder}.*{TEMPORARY_SUFFIX}"
    for folder in ("", f"{MODEL}/", f"{UPLOADS}/round-*/", f"{CHECKPOINTS}/", f"{CHECKPOINTS}/round-*/")
)
_OWN_FOLDERS = (f"{UPLOADS}/round-*", UPLOADS, f"{CHECKPOINTS}/round-*", CHECKPOINTS, MODEL, TENSORBOARD)

logger = logging.getLogger(f"{LIBRARY_LOGGER}.run")


class RunDirectory:
    """The directory of a run's results, locked by one process at a time.

    As a context manager it writes the state of the run to ``status.json``: ``running`` inside the block, then
    ``completed``, ``failed`` with the error, or ``interrupted``. If the process is killed, the state stays ``running``
    but the lock is released.

    Attributes
    ----------
    path
        Absolute path of the directory.
    """

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock
        self._started = _now()

    @classmethod
    def create(cls, output: str, name: str) -> RunDirectory:
        """Make the directory of a new run.

        Parameters
        ----------
        output
            `run.output`; relative to the working directory.
        name
            `run.name`. Empty: date, time and a random suffix. With a fixed name the results of an earlier run that
            collected no upload are removed first; other files in the directory are kept.

        Raises
        ------
        SettingsError
            If the directory cannot be created, is in use by another run, has uploads of an earlier run, or has files
            with the names of result files that no run has written.
        """
        if name in {".", ".."} or "/" in name or "\\" in name:
            raise SettingsError(("run.name", name, "must be the name of one folder, without slashes"))
        path = expand(output, "run.output").absolute() / (name or fresh_name())
        try:
            path.mkdir(parents=True, exist_ok=bool(name))
            lock = _take_lock(path, name)
        except OSError as error:
            reason = error.strerror or str(error)
            raise SettingsError(("run.output", output, f"cannot be written at {path}: {reason}")) from None
        try:
            refuse_uploads(path, name)
            _clear(path, name)
        except BaseException:
            lock.close()
            raise
        return cls(path, lock)

    @classmethod
    def resume(cls, path: Path) -> RunDirectory:
        """Lock the directory of an interrupted run and remove only its incomplete files.

        Raises
        ------
        SettingsError
            If the directory cannot be written to or is in use by another run.
        """
        try:
            lock = _take_lock(path, path.name)
        except OSError as error:
            reason = error.strerror or str(error)
            raise SettingsError(("run.resume", str(path), f"cannot be written: {reason}")) from None
        _remove(path, _TEMPORARY_PATTERNS)
        return cls(path, lock)

    def checkpoints(self, round_number: int) -> Path:
        """Return the directory of a round's checkpoints."""
        return self.path / CHECKPOINTS / f"round-{round_number}"

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints, which only resuming needs; the uploads are kept."""
        _remove(self.path, _CHECKPOINT_PATTERNS)
        _remove_empty_folders(self.path)

    def uploads(self, round_number: int) -> Path:
        """Return the directory of a round's uploads."""
        return self.path / UPLOADS / f"round-{round_number}"

    def write_json(self, name: str, value: Json) -> None:
        """Write a JSON document atomically."""
        write_json(self.path / name, value)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Write the log of this library, including its debug messages, and that of Flower to ``log.txt``."""
        with file_log(self.path / LOG):
            yield

    def __enter__(self) -> Self:
        self._write_status("running", None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write_status("completed", None)
                return
            try:
                if isinstance(error, Exception):
                    self._write_status("failed", f"{type(error).__name__}: {error}")
                else:
                    self._write_status("interrupted", _STOPPED)
            except OSError as problem:  # report the error that failed the run, such as a full disk
                logger.error("%s cannot be written: %s", STATUS, problem)
        finally:
            self._lock.close()

    def _write_status(self, state: str, error: str | None) -> None:
        ended = None if state == "running" else _now()
        self.write_json(STATUS, {"state": state, "error": error, "started": self._started, "ended": ended})


def _take_lock(path: Path, name: str) -> IO[str]:
    """Lock the directory for this process; the kernel releases the lock when the process ends."""
    lock = (path / _LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise SettingsError(
            ("run.name", name, f"another run is writing to {path}; use another name or wait until it ends")
        ) from None
    return lock


def refuse_uploads(path: Path, name: str) -> None:
    """Refuse a new run in a directory with uploads, because a one-shot exchange cannot be repeated.

    Raises
    ------
    SettingsError
        If there are uploads. The message says how to resume the earlier run.
    """
    if any(path.glob(UPLOADED)):
        allowed = (
            f"{path} has uploads of an earlier run, which a new run does not delete; resume that run with "
            f'`fedmitr resume {path}` (in a deployment with run.resume = "{path}"), or use another name'
        )
        raise SettingsError(("run.name", name, allowed))


def _clear(path: Path, name: str) -> None:
    """Remove the files that an earlier run wrote, and no others."""
    if not (path / STATUS).exists():
        foreign = [file for file in _OWN_FILES if (path / file).exists()]
        if foreign:
            allowed = f"{path} has a file {foreign[0]} that no run wrote; use another name"
            raise SettingsError(("run.name", name, allowed))
    _remove(path, (*_OWN_PATTERNS, *_CHECKPOINT_PATTERNS, *_TEMPORARY_PATTERNS))
    # Remove the status last, so that a partly cleared directory is still recognised as that of a run.
    for file in [*_OWN_FILES[1:], _OWN_FILES[0]]:
        (path / file).unlink(missing_ok=True)
    _remove_empty_folders(path)


def _remove(path: Path, patterns: Iterable[str]) -> None:
    for file in [match for pattern in patterns for match in path.glob(pattern)]:
        file.unlink(missing_ok=True)


def _remove_empty_folders(path: Path) -> None:
    for pattern in _OWN_FOLDERS:
        for folder in path.glob(pattern):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def fresh_name() -> str:
    """Return a new name for a run's folder: date, time and a random suffix."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
