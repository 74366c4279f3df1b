"""The user's home directory, and paths that begin with ``~``.

A container that runs under an arbitrary user number (``docker run --user 12345``) often has neither HOME nor an entry
in the list of users. Caches of this library, PyTorch, Hugging Face, Matplotlib and Ray then fail with an error, or
write to a folder that is called ``~``.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
import tempfile
from pathlib import Path

from fedmitr_flwr.settings.run_config import SettingsError

# A home directory that cannot be written to is kept if it has one of these: caches and configurations to read.
_CONTENTS = (".cache", ".config", ".flwr")


def ensure_home() -> None:
    """Set HOME and USER for this process and its children if they are unknown, or if HOME cannot be used.

    HOME becomes a folder in the temporary directory that belongs to the user number and that others cannot read. An
    environment with a home directory and a user name is not changed.
    """
    with contextlib.suppress(OSError):
        if not _is_usable(Path(os.path.expanduser("~"))):  # Path.expanduser raises without a home
            os.environ["HOME"] = str(_temporary_home())
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user-{os.getuid()}"


def expand(path: Path | str, key: str = "path", *, reachable: bool = True) -> Path:
    """Replace ``~`` at the start of a path by the home directory.

    A path that begins with ``~NAME`` is kept if there is no user of this name but such a file or folder.

    Parameters
    ----------
    path
        A path as a user wrote it.
    key
        Setting or option that has the path, for the message.
    reachable
        Whether to refuse a path that cannot be used at all: one with a name that is too long, or below a folder that
        may not be entered. A path that does not exist is accepted.

    Raises
    ------
    SettingsError
        If the path begins with ``~NAME`` and there is neither a user of this name nor such a file, or if the path
        cannot be used.
    """
    try:
        found = Path(path).expanduser()
        if reachable:
            os.lstat(found)
        return found
    except (FileNotFoundError, NotADirectoryError):
        return found
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError((key, str(path), f"cannot be used as a path: {reason}")) from None
    except RuntimeError:
        if os.path.lexists(path):
            return Path(path)
        allowed = "begins with ~, but no such user has a home directory on this machine; write the whole path"
        raise SettingsError((key, str(path), allowed)) from None


def _is_usable(home: Path) -> bool:
    # An empty HOME is read as the root directory, or as the current one.
    if os.environ.get("HOME") == "" or not home.is_absolute() or not home.is_dir():
        return False
    return os.access(home, os.W_OK | os.X_OK) or any(os.access(home / name, os.R_OK) for name in _CONTENTS)


def _temporary_home() -> Path:
    """Return the folder of this user number; a new one if another user has made a folder of this name."""
    home = Path(tempfile.gettempdir()) / f"fedmitr-home-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    status = home.lstat()
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return home if private else Path(tempfile.mkdtemp(prefix="fedmitr-home-"))
