"""A user cache, addressed by content, that several processes may fill at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.runs.atomic import atomic_path

log = logging.getLogger("fedmitr.data")


def cache_dir() -> Path:
    """Where things are cached: FEDMITR_CACHE, else XDG_CACHE_HOME/fedmitr, else ~/.cache/fedmitr."""
    own = os.environ.get("FEDMITR_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() if own else Path(shared).expanduser() / "fedmitr"


def cached_array(name: str, make: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return an array from the cache, or make it and put it there.

    Parameters
    ----------
    name
        File name without its ending. Must contain a digest of all that the array depends on.
    make
        Makes the array; slow.

    Notes
    -----
    A damaged file is made anew. Without a writable cache the array is made each time.
    """
    path = cache_dir() / "data" / f"{name}.npy"
    try:
        array = np.load(path, allow_pickle=False)
        if isinstance(array, np.ndarray) and array.dtype == np.uint8:
            return array
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        log.warning("the cached file %s is damaged and is made anew (%s)", path, error)
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, made, allow_pickle=False)
    except OSError as error:
        log.warning("cannot write the cache at %s (%s)", path.parent, error)
    return made


def is_marked(name: str) -> bool:
    """Whether `mark` was called with this name on this machine."""
    return (cache_dir() / "marks" / name).is_file()


def mark(name: str) -> None:
    """Remember a fact, named by a digest of all that it depends on; does nothing without a writable cache."""
    path = cache_dir() / "marks" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        log.warning("cannot write the cache at %s (%s)", path.parent, error)
