"""Files below a folder: what is there, what is left out, and what stops the search.

A folder that may not be read and a link that leads nowhere or in a circle are errors, because the images behind them
would be missing without a word.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedmitr_flwr.data.sources.names import shown
from fedmitr_flwr.data.sources.raw import Origin


@dataclass
class Entries:
    """The content of one folder.

    Attributes
    ----------
    folders, files
        Visible folders and regular files, sorted; links to them count as what they lead to.
    hidden
        Names that begin with a dot, and folders that begin with two underscores, such as ``__MACOSX``.
    special
        Pipes, sockets and devices.
    status
        Status of each of the files; of a link, that of its target.
    """

    folders: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)
    status: dict[Path, os.stat_result] = field(default_factory=dict)


def entries(folder: Path, origin: Origin) -> Entries:
    """List one folder.

    Raises
    ------
    SettingsError
        If the folder does not exist or may not be read, or if a link in it leads nowhere or in a circle.
    """
    found = Entries()
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise origin.error(f"the folder {shown(folder)} cannot be read: {error.strerror or error}") from None
    for name in names:
        path = folder / name
        if name.startswith("."):
            found.hidden.append(path)
            continue
        status = _status(path, origin)
        if stat.S_ISDIR(status.st_mode):
            (found.hidden if name.startswith("__") else found.folders).append(path)
        elif stat.S_ISREG(status.st_mode):
            found.files.append(path)
            found.status[path] = status
        else:
            found.special.append(path)
    return found


def walk(folder: Path, origin: Origin) -> Iterator[Entries]:
    """Yield the entries of a folder and of all visible folders below it, also of those behind links.

    Raises
    ------
    SettingsError
        As for `entries`; also if a link leads to a folder that it lies in.
    """
    waiting = [(folder, _above(folder))]
    while waiting:
        place, above = waiting.pop()
        found = entries(place, origin)
        yield found
        for path in reversed(found.folders):
            status = _status(path, origin)
            inode = (status.st_dev, status.st_ino)
            link = path.is_symlink()
            if link and inode in above:
                raise origin.error(f"the link {shown(path)} leads in a circle, to a folder that it lies in; remove it")
            waiting.append((path, above | {inode} | (_above(path) if link else set())))


def exists(path: Path, origin: Origin, *, folder: bool = False) -> bool:
    """Return whether there is a file or folder of this path, or a folder only.

    Raises
    ------
    SettingsError
        If a folder above it may not be entered.
    """
    try:
        mode = os.stat(path).st_mode
        return stat.S_ISDIR(mode) or not folder
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise origin.error(f"{shown(path)} cannot be read: {getattr(error, 'strerror', None) or error}") from None


@dataclass
class Files:
    """The files of a source so far, to notice a file that is reached twice through links.

    Attributes
    ----------
    by_inode
        Device and inode of each file, and the path under which it was first found.
    """

    by_inode: dict[tuple[int, int], Path] = field(default_factory=dict)

    def earlier(self, path: Path, status: os.stat_result) -> Path | None:
        """Return the path under which this file was found before; None at the first time.

        The content is not compared: a copy of a file is another file.
        """
        key = (status.st_dev, status.st_ino)
        first = self.by_inode.setdefault(key, path)
        if first is path:
            return None
        # Some network file systems give two files the same inode number.
        return first if status.st_nlink > 1 or os.path.realpath(first) == os.path.realpath(path) else None


def by_ending(paths: list[Path]) -> str:
    """Count files by their ending: ``12 .png, 1 without an ending``."""
    counts = Counter(os.path.splitext(path)[1].lower() or "without an ending" for path in paths)
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {shown(ending)}" for ending, count in order)


def _above(folder: Path) -> set[tuple[int, int]]:
    """Return device and inode of a folder and of all folders above it, by its real path."""
    real = Path(os.path.realpath(folder))
    statuses = [os.stat(place) for place in (real, *real.parents) if os.access(place, os.F_OK)]
    return {(status.st_dev, status.st_ino) for status in statuses}


def _status(path: Path, origin: Origin) -> os.stat_result:
    try:
        return os.stat(path)
    except FileNotFoundError:
        if not path.is_symlink():
            raise origin.error(f"{shown(path)} has been removed while the folder was read") from None
        raise origin.error(
            f"the link {shown(path)} leads nowhere ({shown(os.path.realpath(path))} does not exist); "
            "mount or restore its target, or remove the link"
        ) from None
    except OSError as error:
        raise origin.error(f"{shown(path)} cannot be read: {error.strerror or error}") from None
