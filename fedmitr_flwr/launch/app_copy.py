"""Copy the files of a Flower app that `flwr run` packs.

A bundle holds few files, but `flwr run` looks at every file below the app's folder (Flower 1.41 and 1.42). With a
`.venv` of 100,000 files in that folder, this takes over 10 seconds before the run starts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Files that a bundle can hold (flwr.common.constant.FAB_INCLUDE_PATTERNS), and `.gitignore`, which excludes files.
_SUFFIXES = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")
_NAMES = ("LICENSE", ".gitignore")


def stage_app(app: Path, target: Path) -> Path:
    """Copy those files of an app that a bundle can hold, and return the copy's folder.

    Not copied are environments, hidden folders, caches, folders that the app's ``.gitignore`` names, links, and files
    of other types. Flower excludes them too, or does not use them in a run.

    Parameters
    ----------
    app
        Folder with the app's ``pyproject.toml``.
    target
        Folder to create.
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
    """Return the folders that lines such as ``/outputs/`` name. Flower applies the other patterns."""
    file = app / ".gitignore"
    lines = file.read_text("utf-8", "replace").split() if file.is_file() else []
    return {app / line.strip("/") for line in lines if line.startswith("/") and line.endswith("/")}
