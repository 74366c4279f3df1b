"""A cache in the user's home directory, to which several processes may write at the same time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.runs.atomic import atomic_path
from fedmitr_flwr.settings.home import expand

log = logging.getLogger("fedmitr.data")


def cache_dir() -> Path:
    """Return the cache directory: FEDMITR_CACHE, else XDG_CACHE_HOME/fedmitr, else ~/.cache/fedmitr.

    Raises
    ------
    SettingsError
        If one of the variables begins with ``~NAME`` and there is no user of this name.
    """
    own = os.environ.get("FEDMITR_CACHE")
    if own:
        return expand(own, "FEDMITR_CACHE", reachable=False)
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand(shared, "XDG_CACHE_HOME", reachable=False) / "fedmitr"


def cached_array(name: str, make: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return an array from the cache; if it is missing, make it and store it.

    Parameters
    ----------
    name
        File name without its suffix. Must contain a digest of everything that the array depends on.
    make
        Function that makes the array.

    Notes
    -----
    A damaged file is replaced. If the cache is not writable, the array is made in every call.
    """
    path = cache_dir() / "data" / f"{name}.npy"
    try:
        array = np.load(path, allow_pickle=False)
        if isinstance(array, np.ndarray) and array.dtype == np.uint8:
            return array
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        log.warning("the cached file %s is damaged and will be replaced (%s)", path, error)
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, made, allow_pickle=False)
    except OSError as error:
        log.warning("cannot write to the cache %s (%s)", path.parent, error)
    return made


def marked(name: str) -> str | None:
    """Return the text that `mark` stored under this name on this machine, or None."""
    try:
        return (cache_dir() / "marks" / name).read_text("utf-8")
    except (OSError, ValueError):
        return None


def mark(name: str, text: str) -> None:
    """Store a text under a name that is a digest of all it depends on; a read-only cache stores nothing."""
    path = cache_dir() / "marks" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(text, "utf-8")
    except OSError as error:
        log.warning("cannot write to the cache %s (%s)", path.parent, error)
