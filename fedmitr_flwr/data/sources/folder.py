"""Image files in one folder per class: `folder:PATH`, or the folder of a site.

A file is ``PATH/cat/1.jpg``. With a split it is ``PATH/train/cat/1.jpg``, and ``PATH/test``, ``PATH/val`` or both
have the same structure as ``PATH/train``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path

import numpy as np

from fedmitr_flwr.data.cache import is_marked, mark
from fedmitr_flwr.data.presets import FOLDER
from fedmitr_flwr.data.sources.decode import FileReader, damaged_files
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, VALIDATION, Header, Origin, RawSource

log = logging.getLogger("fedmitr.data")

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
TEST_NAMES = ("test", "val", "valid", "validation")


def folder_header(root: Path, origin: Origin) -> Header:
    """Return the header of a folder; classes are sorted by name as in torchvision's ImageFolder.

    Raises
    ------
    SettingsError
        If the folder does not exist or has no class folders.
    """
    return _header(_parts(root, origin), origin)


def load_folder(root: Path, origin: Origin, *, train_only: bool = False) -> RawSource:
    """Find all images and check that each can be decoded; the pixels are decoded again in every read.

    Parameters
    ----------
    root
        The folder.
    origin
        The setting that named the folder, for error messages.
    train_only
        Ignore test and validation folders and allow empty class folders. Used for the data of a site.

    Raises
    ------
    SettingsError
        If the folder does not exist or has no class folders, a class folder has no image, the test folder has a class
        that the training folder does not have, or a file is damaged.
    """
    parts = _parts(root, origin)
    header = _header(parts, origin)
    paths: list[Path] = []
    labels: list[int] = []
    split: list[int] = []
    for part, folder in parts.items():
        if train_only and part != TRAIN:
            continue
        for name in _class_names(folder):
            if name not in header.class_names:
                raise origin.error(f"{folder} has the class folder {name!r}, but {parts[TRAIN]} does not")
            files = _image_files(folder / name)
            if not files and part == TRAIN and not train_only:
                raise origin.error(f"the class folder {folder / name} has no image file ({', '.join(sorted(ENDINGS))})")
            paths += files
            labels += [header.class_names.index(name)] * len(files)
            split += [part] * len(files)
    _check_images(root, paths, origin)
    return RawSource(
        header,
        FileReader(tuple(paths), origin),
        np.asarray(labels, np.int64),
        np.asarray(split, np.int8),
    )


def _parts(root: Path, origin: Origin) -> dict[int, Path]:
    """Return the folder of each split; without a split, the root is the training folder."""
    if not root.is_dir():
        raise origin.error(f"the folder {root} does not exist")
    there = [name for name in TEST_NAMES if (root / name).is_dir()]
    # A folder "train" may be a class of vehicles. It is a split if it is alone or if there is a test folder.
    if not (root / "train").is_dir() or not (there or _class_names(root) == ["train"]):
        return {TRAIN: root}
    parts = {TRAIN: root / "train"}
    if there:
        parts[TEST] = root / there[0]
    if len(there) > 1 and there[0] == "test":
        parts[VALIDATION] = root / there[1]
    return parts


def _header(parts: dict[int, Path], origin: Origin) -> Header:
    names = _class_names(parts[TRAIN])
    if not names:
        raise origin.error(
            f"{parts[TRAIN]} has no class folders; put the images of each class into a folder of their own"
        )
    return Header(origin, tuple(names), True, FOLDER)


def _class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _image_files(folder: Path) -> list[Path]:
    found = []
    for place, _, names in os.walk(folder, followlinks=True):
        found += [Path(place, n) for n in names if Path(n).suffix.lower() in ENDINGS and not n.startswith(".")]
    return sorted(found)


def _check_images(root: Path, paths: list[Path], origin: Origin) -> None:
    """Check that each file can be decoded; skip a folder that passed with the same names, sizes and times."""
    lines = []
    for path in paths:
        stat = path.stat()
        lines.append(f"{path.relative_to(root)}\t{stat.st_size}\t{stat.st_mtime_ns}")
    name = "decodes-" + hashlib.sha256("\n".join([str(root.resolve()), *lines]).encode()).hexdigest()[:20]
    if is_marked(name):
        return
    start = time.monotonic()
    damaged = damaged_files(paths)
    if damaged:
        path, reason = damaged[0]
        more = f" (and {len(damaged) - 1} more damaged files)" if len(damaged) > 1 else ""
        raise origin.error(f"cannot read the image {path}: {reason}{more}; repair or remove it")
    if time.monotonic() - start > 0.5:
        mark(name)
