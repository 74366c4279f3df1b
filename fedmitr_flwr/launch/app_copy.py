"""A lean copy of a Flower app for `flwr run` to pack.

Flower's bundle takes little, but `flwr run` first looks at every file below the app's folder, an environment in it
included (Flower 1.41): with the 100,000 files of a `.venv` that takes over 10 seconds before anything starts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# What a bundle can hold (flwr.common.constant.FAB_INCLUDE_PATTERNS), and what decides what is left out of it.
_SUFFIXES = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")
_NAMES = ("LICENSE", ".gitignore")


def stage_app(app: Path, target: Path) -> Path:
    """Copy of an app all that a bundle can hold, and return the copy's folder.

    Environments, hidden folders, caches, folders that the app's ``.gitignore`` names, links, and files of other types
    stay behind: Flower leaves them out as well, or has no use for them in a run.

    Parameters
    ----------
    app
        Folder with the app's ``pyproject.toml``.
    target
        Folder that does not exist yet.
    """
    for path in _files(app, _ignored(app)):
        copy = target / path.relative_to(app)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return target


def _files(app: Path, ignored: set[Path]) -> Iterator[Path]:
    for folder, folders, names in os.walk(app):
        here = Path(folder)
        folders[:] = [name for name in folders if not _left_out(here / name, ignored)]
        for name in names:
            path = here / name
            if (path.suffix in _SUFFIXES or name in _NAMES) and not path.is_symlink():
                yield path


def _left_out(folder: Path, ignored: set[Path]) -> bool:
    return (
        folder.name.startswith(".")
        or folder.name == "__pycache__"
        or folder in ignored
        or (folder / "pyvenv.cfg").is_file()
    )


def _ignored(app: Path) -> set[Path]:
    """Folders that lines such as ``/outputs/`` name; finer patterns are left to Flower."""
    file = app / ".gitignore"
    lines = file.read_text("utf-8", "replace").split() if file.is_file() else []
    return {app / line.strip("/") for line in lines if line.startswith("/") and line.endswith("/")}
