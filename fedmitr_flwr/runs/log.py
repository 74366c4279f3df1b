"""The log of a run: what this library and Flower say, on the console and in the run's ``log.txt``."""

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
    """Show this library's log on stderr, in Flower's style, while the block runs."""
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
    """Append this library's log, with its details, and Flower's to a file while the block runs."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-8s %(message)s"))
    handler.addFilter(lambda record: record.levelno >= logging.INFO or record.name.startswith(LIBRARY_LOGGER))
    with _attached(handler, LIBRARY_LOGGER), _attached(handler, FLOWER_LOGGER):
        try:
            yield
        finally:
            handler.close()


class _FlowerStyle(logging.Formatter):
    """``INFO :      message``, in line with what Flower logs before and after."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; without its traceback, which belongs into the file."""
        return f"{record.levelname} : {'':{max(0, 8 - len(record.levelname))}} {record.getMessage()}"


@contextmanager
def failures_logged() -> Iterator[None]:
    """Log an exception on its way through: one plain message, and the traceback among the details."""
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
