"""The log of a run: messages of this library and of Flower, on the console and in the run's ``log.txt``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARY_LOGGER = "fedmitr"
FLOWER_LOGGER = "flwr"

logger = logging.getLogger(f"{LIBRARY_LOGGER}.run")


@contextmanager
def console_log() -> Iterator[None]:
    """Print this library's log on stderr in Flower's style while the block runs."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)
    handler.setFormatter(_FlowerStyle())
    library = logging.getLogger(LIBRARY_LOGGER)
    level, propagate = library.level, library.propagate
    library.setLevel(logging.DEBUG)
    library.propagate = False
    try:
        with _attached(handler, LIBRARY_LOGGER):
            yield
    finally:
        library.setLevel(level)
        library.propagate = propagate


@contextmanager
def file_log(path: Path) -> Iterator[None]:
    """Append this library's log, including debug messages, and Flower's log to a file while the block runs."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-8s %(message)s"))
    handler.addFilter(lambda record: record.levelno >= logging.INFO or record.name.startswith(LIBRARY_LOGGER))
    with _attached(handler, LIBRARY_LOGGER), _attached(handler, FLOWER_LOGGER):
        try:
            yield
        finally:
            handler.close()


class _FlowerStyle(logging.Formatter):
    """The format of Flower's log: ``INFO :      message``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text without its traceback, which is written to the log file only."""
        return f"{record.levelname} : {'':{max(0, 8 - len(record.levelname))}} {record.getMessage()}"


@contextmanager
def failures_logged() -> Iterator[None]:
    """Log an exception as one message, log its traceback at debug level, and raise it again."""
    try:
        yield
    except Exception as error:
        logger.error("The run failed. %s: %s", type(error).__name__, error)
        logger.debug("Traceback:", exc_info=True)
        raise


@contextmanager
def _attached(handler: logging.Handler, name: str) -> Iterator[None]:
    target = logging.getLogger(name)
    target.addHandler(handler)
    try:
        yield
    finally:
        target.removeHandler(handler)
