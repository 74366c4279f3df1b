"""Image files in one folder per class: `folder:PATH`, or the folder of a site.

A file is ``PATH/cat/1.jpg``. With a split it is ``PATH/train/cat/1.jpg``, and the folders for testing and validation
beside ``PATH/train`` have the same structure. `names.split_folders` says which names are splits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fedmitr_flwr.data.cache import mark, marked
from fedmitr_flwr.data.images import Labels
from fedmitr_flwr.data.presets import FOLDER
from fedmitr_flwr.data.sources.decode import FileReader, has_image_ending, inspect_files, is_image
from fedmitr_flwr.data.sources.depth import Peaks, white_of
from fedmitr_flwr.data.sources.files import Files, by_ending, entries, exists, walk
from fedmitr_flwr.data.sources.names import (
    SplitNamesError,
    alike,
    almost,
    are_parts,
    held_out_only,
    is_training,
    positions,
    same_name,
    same_split,
    shown,
    spelt,
    split_folders,
    unusable,
)
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, VALIDATION, Header, Origin, RawSource

log = logging.getLogger("fedmitr.data")

HeldOut = Literal["load", "ignore", "refuse"]

_PART_NAMES = {TRAIN: "training", TEST: "test", VALIDATION: "validation"}
# Files that Windows puts into folders with pictures.
_SYSTEM_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db")


def folder_header(root: Path, origin: Origin) -> Header:
    """Return the header of a folder; classes are sorted by name as in torchvision's ImageFolder.

    Raises
    ------
    SettingsError
        If the folder does not exist, may not be read or has no class folders, or if its folders may be splits and
        classes alike.
    """
    return _header(_find_parts(root, origin, _LeftOut()), origin)


def load_folder(
    root: Path,
    origin: Origin,
    *,
    held_out: HeldOut = "load",
    known: Sequence[str] = (),
    accept: Callable[[Header, Labels], None] | None = None,
) -> RawSource:
    """Find all images, check that each can be decoded and log what was found and what was left out.

    The pixels are decoded again in every read.

    Parameters
    ----------
    root
        The folder.
    origin
        The setting that named the folder, for error messages.
    held_out
        What to do with folders for testing and validation. "ignore" is for the data of a site; a class folder may then
        be empty. "refuse" is for one set of images, where it must be clear which images are meant; class folders may be
        empty too.
    known
        Names of classes that the settings or the federation give. They decide between the classes where all class
        folders have the same folders in them.
    accept
        Called with the header and the labels before an image is decoded; may raise a `SettingsError`.

    Raises
    ------
    SettingsError
        As for `folder_header`; also if a class has no image for training, if the folders for testing and validation
        have a class that the training folder does not have, if all class folders have the same folders in them, if the
        same file is in two classes or splits, if a link leads nowhere or in a circle, if a file is damaged, or if the
        value of white is not known (`depth`).
    """
    left = _LeftOut()
    parts = _find_parts(root, origin, left)
    header = _header(parts, origin)
    if held_out == "refuse" and len(parts) > 1:
        names = ", ".join(shown(os.path.relpath(place, root)) for place in parts.values())
        raise origin.error(f"has the splits {names}; name the folder of one of them")
    search = _Search(header, origin, left, held_out == "load", known)
    for part, folder in parts.items():
        if part == TRAIN or held_out == "load":
            search.add(part, folder)
    labels = np.asarray(search.labels, np.int64)
    if accept is not None:
        accept(header, labels)
    peaks, left.several = _check_images(root, search.paths, search.stamps, origin)
    try:
        white = white_of(peaks)
    except ValueError as error:
        raise origin.error(str(error)) from None
    ignored = [place for part, place in parts.items() if part not in search.numbers]
    search.log_found(root, ignored)
    left_out = left.phrases(root)
    if left_out and held_out != "load":  # `load_source` logs what it leaves out itself
        log.warning("%s: left out: %s", shown(origin.value), ", ".join(left_out))
    if left.hidden:
        log.info("%s: left out: %d hidden files and folders", shown(origin.value), len(left.hidden))
    reader = FileReader(tuple(search.paths), origin, white)
    return RawSource(header, reader, labels, np.asarray(search.split, np.int8), left_out=left_out)


@dataclass
class _LeftOut:
    """What a search has left out."""

    beside: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    unlabelled: list[Path] = field(default_factory=list)
    no_image: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)
    twice: int = 0
    several: int = 0

    def phrases(self, root: Path) -> tuple[str, ...]:
        """Return a phrase for each kind of thing that is left out, except for hidden files."""
        counted = (
            (len(self.no_image), f"files that are no image that can be read ({by_ending(self.no_image)})"),
            (len(self.beside), f"files that lie in no class folder ({by_ending(self.beside)})"),
            (len(self.folders), f"folders beside the splits ({_relative(self.folders, root)})"),
            (len(self.special), f"pipes, sockets or devices ({_relative(self.special, root)})"),
            (self.twice, "links to files that their class has already"),
        )
        found = [f"{number} {what}" for number, what in counted if number]
        found += [f"the folder {_relative([place], root)}, which has no class folders" for place in self.unlabelled]
        return (*found, *([f"all but the first picture of {self.several} files"] if self.several else []))


@dataclass
class _Search:
    """Collects the images of all splits and classes.

    Attributes
    ----------
    header, origin
        Classes, and the setting that named the source.
    left
        What is left out.
    strict
        Whether each class must have an image for training.
    known
        Names that are certainly those of classes.
    paths, labels, split, stamps
        File, label, split, and size and time of change of each image.
    numbers, places
        Number of images and folder of each split.
    """

    header: Header
    origin: Origin
    left: _LeftOut
    strict: bool
    known: Sequence[str]
    paths: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    stamps: list[str] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    places: dict[int, Path] = field(default_factory=dict)
    _files: Files = field(default_factory=Files)
    _owner: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def add(self, part: int, folder: Path) -> None:
        """Collect the images of one split."""
        self.places[part] = folder
        classes = _class_folders(folder, self.origin)
        if not classes:
            self.left.unlabelled.append(folder)
        folded = Counter(name.casefold() for name in classes)
        case = [name for name in classes if len(name) > 1 and folded[name.casefold()] > 1]
        if case and part == TRAIN:
            log.warning("%s: classes that differ only in case: %s", shown(self.origin.value), _listed(case))
        below: list[set[str]] = []
        before = len(self.paths)
        for (name, place), label in zip(
            classes.items(), positions(list(classes), self.header.class_names).tolist(), strict=True
        ):
            if label < 0:
                missing = f"but {shown(self.places[TRAIN])} does not{almost(name, self.header.class_names)}"
                raise self.origin.error(f"{shown(folder)} has the class folder {spelt(name)}, {missing}")
            below.append(self._add_class(part, label, place))
        self.numbers[part] = len(self.paths) - before
        used = set(self.labels[before:])
        if part != TRAIN and classes and len(used) < len(self.header.class_names):
            lacking = [name for label, name in enumerate(self.header.class_names) if label not in used]
            log.warning("%s: %s has no image of: %s", shown(self.origin.value), shown(folder), _listed(lacking))
        shared = set.intersection(*below) if len(below) > 1 else set()
        if shared and part == TRAIN:
            self._check_shared(list(classes), sorted(shared))

    def _check_shared(self, classes: list[str], shared: list[str]) -> None:
        """Refuse class folders that may be sites, years or splits above the real classes, unless they are known."""
        if (positions(classes, self.known) >= 0).all():
            return
        text = (
            f"all class folders ({_listed(classes)}) have the same folders ({_listed(shared)}) and no images beside "
            "them; if those are the classes, put them directly into one folder"
        )
        # A single folder, as in CLASS/images, is not a class.
        if len(shared) > 1 or are_parts(classes):
            raise self.origin.error(
                f"{text}; if {_listed(classes[:2])} are classes, set data.class-names to all of them"
            )
        log.warning("%s: %s", shown(self.origin.value), text)

    def _add_class(self, part: int, label: int, place: Path) -> set[str]:
        """Collect the images of one class; return its folders if there is no image beside them."""
        found: list[Path] = []
        unread: list[Path] = []
        status: dict[Path, os.stat_result] = {}
        for there in walk(place, self.origin):
            status.update(there.status)
            for path in there.files:
                (found if self._is_image(path) else unread).append(path)
            self.left.hidden += there.hidden
            self.left.special += there.special
        # Sorted as a whole, as in earlier versions: the order decides which images are held out.
        images = [path for path in sorted(found) if not self._is_known(path, status[path], part, label)]
        self.stamps += [f"{status[path].st_size}\t{status[path].st_mtime_ns}" for path in images]
        system = [path for path in unread if path.name.lower() in _SYSTEM_FILES]
        self.left.hidden += system
        unread = [path for path in unread if path not in system]
        self.left.no_image += unread
        if not images and part == TRAIN and self.strict:
            what = f"; its files are no images that can be read ({by_ending(unread)})" if unread else ""
            raise self.origin.error(f"the class folder {shown(place)} has no image file{what}")
        self.paths += images
        self.labels += [label] * len(images)
        self.split += [part] * len(images)
        if any(path.parent == place for path in images):
            return set()
        return {path.relative_to(place).parts[0] for path in images}

    def _is_image(self, path: Path) -> bool:
        try:
            return has_image_ending(path) or is_image(path)
        except PermissionError as error:
            raise self.origin.error(f"the file {shown(path)} cannot be read: {error.strerror}") from None

    def _is_known(self, path: Path, status: os.stat_result, part: int, label: int) -> bool:
        """Return whether this class has the file already; refuse a file of another class or split."""
        first = self._files.earlier(path, status)
        if first is None:
            self._owner[path] = (part, label)
            return False
        owner = self._owner[first]
        if owner != (part, label):
            what = "splits" if owner[0] != part else "classes"
            raise self.origin.error(f"{shown(first)} and {shown(path)} are the same file in two {what}; remove one")
        self.left.twice += 1
        return True

    def log_found(self, root: Path, ignored: list[Path]) -> None:
        """Log the number of images, of classes and of images of each split."""
        split = ""
        if len(self.places) > 1 or self.places[TRAIN] != root:
            split = "; " + ", ".join(
                f"{self.numbers[part]} {_PART_NAMES[part]} images from {shown(os.path.relpath(place, root))}"
                for part, place in self.places.items()
            )
        if ignored:
            split += f"; not used: {_relative(ignored, root)}"
        endings = f" ({by_ending(self.paths)})" if self.paths else ""
        text = f"{len(self.paths)} images of {len(set(self.labels))} classes{endings}{split}"
        log.info("%s: %s", shown(self.origin.value), text)


def _find_parts(root: Path, origin: Origin, left: _LeftOut) -> dict[int, Path]:
    """Return the folder of each split; without a split, the root is the training folder."""
    if not exists(root, origin, folder=True):
        raise origin.error(f"the folder {shown(root)} does not exist")
    here = entries(root, origin)
    names = [place.name for place in here.folders]
    try:
        splits = split_folders(names)
    except SplitNamesError as error:
        raise origin.error(f"in {shown(root)}, {error}") from None
    if not splits and len(names) == 1:
        only = here.folders[0]
        below = entries(only, origin)
        if below.folders and is_training(only.name):
            splits = {TRAIN: only.name}
        elif below.folders and not any(map(has_image_ending, below.files)):
            left_below = _LeftOut()
            inner = _find_parts(only, origin, left_below)
            if inner != {TRAIN: only}:  # the only folder is not a class, but has the splits
                left.beside += here.files + left_below.beside
                left.hidden += here.hidden + left_below.hidden
                left.folders += left_below.folders
                return inner
    left.beside += here.files
    left.hidden += here.hidden
    if not splits:
        _check_classes(here.folders, origin)
        return {TRAIN: root}
    left.folders += [place for place in here.folders if place.name not in splits.values()]
    parts = {part: _innermost(root / name, origin) for part, name in splits.items()}
    for place in parts.values():
        inside = entries(place, origin)
        left.beside += inside.files
        left.hidden += inside.hidden
    return parts


def _innermost(place: Path, origin: Origin) -> Path:
    """Return the folder with the class folders of a split: ``train/train`` if ``train`` has nothing else."""
    inside = entries(place, origin).folders
    if len(inside) == 1 and same_split(inside[0].name, place.name) and entries(inside[0], origin).folders:
        return _innermost(inside[0], origin)
    return place


def _check_classes(folders: list[Path], origin: Origin) -> None:
    """Refuse folders that are no splits together and cannot be classes."""
    for place in folders:
        if held_out_only(place.name):
            raise origin.error(
                f"the folder {shown(place)} has the name of a split, but no folder for training lies beside it; "
                "put the classes for training into a folder `train`, or rename the folder if it is a class"
            )
        below = entries(place, origin)
        if is_training(place.name) and len(below.folders) > 1 and not any(map(has_image_ending, below.files)):
            raise origin.error(
                f"the folder {shown(place)} looks like a split, because it has folders and no images, but no folder "
                "for testing or validation lies beside it; name this folder alone, or put the images of a class "
                "directly into its folder"
            )
        try:
            inner = split_folders([folder.name for folder in below.folders])
        except SplitNamesError:
            inner = {TRAIN: ""}
        if inner:
            raise origin.error(
                f"the class folder {shown(place)} has split folders in it "
                f"({', '.join(shown(folder.name) for folder in below.folders)}); a split stands above its classes, as "
                "in train/CLASS and test/CLASS"
            )


def _header(parts: dict[int, Path], origin: Origin) -> Header:
    names = _class_folders(parts[TRAIN], origin)
    if not names:
        other = next(
            (f", but is the training split beside {shown(parts[part])}" for part in parts if part != TRAIN), ""
        )
        hint = ", or rename the two if they are classes" if other else ""
        raise origin.error(
            f"{shown(parts[TRAIN])} has no class folders{other}; put the images of each class into a folder of their "
            f"own{hint}"
        )
    return Header(origin, tuple(names), True, FOLDER)


def _class_folders(folder: Path, origin: Origin) -> dict[str, Path]:
    """Return the folder of each class, sorted by the name of the class."""
    folders = entries(folder, origin).folders
    for place in folders:
        why = unusable(place.name)
        if why:
            raise origin.error(f"the class folder {shown(place)} cannot be used: {why}; rename it")
    pair = alike(place.name for place in folders)
    if pair:
        raise origin.error(
            f"{shown(folder)} has two class folders whose names look alike: {spelt(pair[0])} and {spelt(pair[1])}; "
            "rename one or put their images together"
        )
    return {same_name(place.name): place for place in sorted(folders, key=lambda place: same_name(place.name))}


def _check_images(root: Path, paths: list[Path], stamps: list[str], origin: Origin) -> tuple[Peaks, int]:
    """Check that each file can be decoded; skip a folder that passed with the same names, sizes and times.

    Returns
    -------
    peaks
        Largest values of the images of more than 8 bits.
    several
        Number of files with several pictures.
    """
    digest = hashlib.sha256(os.fsencode(os.path.realpath(root)))
    for path, stamp in zip(paths, stamps, strict=True):
        digest.update(os.fsencode(f"\n{str(path)[len(str(root)) :]}\t{stamp}"))
    name = "inspected-" + digest.hexdigest()[:20]
    try:
        before = json.loads(marked(name) or "")
        return Peaks(before["integer"], before["real"]), int(before["several"])
    except (ValueError, KeyError, TypeError):
        pass
    start = time.monotonic()
    found = inspect_files(paths)
    if found.damaged:
        path, why = found.damaged[0]
        more = f" (and {len(found.damaged) - 1} more damaged or unsupported files)" if len(found.damaged) > 1 else ""
        raise origin.error(f"cannot read the image {shown(path)}: {why}{more}; repair, convert or remove it")
    if time.monotonic() - start > 0.5:
        peaks = found.peaks
        mark(name, json.dumps({"integer": peaks.integer, "real": peaks.real, "several": found.several}))
    return found.peaks, found.several


def _relative(places: list[Path], root: Path) -> str:
    return _listed([os.path.relpath(place, root) for place in places])


def _listed(names: list[str]) -> str:
    return ", ".join(map(shown, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
