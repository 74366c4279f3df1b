"""Image files in one folder a class: `folder:PATH`, or a site's own folder.

``PATH/cat/1.jpg`` or, with a split, ``PATH/train/cat/1.jpg`` beside ``PATH/test`` (and/or ``PATH/val``).
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
    """List the class folders; names sort as in torchvision's ImageFolder.

    Raises
    ------
    SettingsError
        If there is no such folder, or no class folder in it.
    """
    return _header(_parts(root, origin), origin)


def load_folder(root: Path, origin: Origin, *, train_only: bool = False) -> RawSource:
    """Find all images and check that each one decodes; they are decoded again when they are used.

    Parameters
    ----------
    root
        The folder.
    origin
        Who named it.
    train_only
        Leave test and validation folders alone, and let class folders be empty: a site's own data.

    Raises
    ------
    SettingsError
        If there is no such folder, it has no class folders, a class folder has no image, the
        test folder has a class that the training folder lacks, or a file is damaged.
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
                raise origin.error(f"{folder} has the class folder {name!r}, which {parts[TRAIN]} lacks")
            files = _image_files(folder / name)
            if not files and part == TRAIN and not train_only:
                raise origin.error(f"the class folder {folder / name} has no image ({', '.join(sorted(ENDINGS))})")
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
    """Find the folders of the splits; without a split, the root is the training part."""
    if not root.is_dir():
        raise origin.error(f"there is no folder {root}")
    there = [name for name in TEST_NAMES if (root / name).is_dir()]
    # A folder "train" may also be a class of vehicles: alone, or beside a test folder, it is a split.
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
        raise origin.error(f"{parts[TRAIN]} has no class folders; images belong in one folder a class")
    return Header(origin, tuple(names), True, FOLDER)


def _class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _image_files(folder: Path) -> list[Path]:
    found = []
    for place, _, names in os.walk(folder, followlinks=True):
        found += [Path(place, n) for n in names if Path(n).suffix.lower() in ENDINGS and not n.startswith(".")]
    return sorted(found)


def _check_images(root: Path, paths: list[Path], origin: Origin) -> None:
    """Decode each file once; a folder that passed is known by its names, sizes and times of change."""
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
        raise origin.error(f"cannot read the image {path}: {reason}{more}; repair it or take it out")
    if time.monotonic() - start > 0.5:
        mark(name)
