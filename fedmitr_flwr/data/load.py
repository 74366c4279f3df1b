"""Load `data.source` as three disjoint sets: training, validation and test."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedmitr_flwr.data.classes import choose_classes, given_names, listed
from fedmitr_flwr.data.images import ImageSet, Labels
from fedmitr_flwr.data.presets import FOLDER, Geometry, find_preset
from fedmitr_flwr.data.sources.builtin import BUILTIN, builtin_header, load_builtin
from fedmitr_flwr.data.sources.folder import folder_header, load_folder
from fedmitr_flwr.data.sources.hub import load_hub
from fedmitr_flwr.data.sources.npz import load_npz, npz_header
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, VALIDATION, Header, Origin, RawSource
from fedmitr_flwr.data.spec import ImageSpec
from fedmitr_flwr.data.splits import complete_split
from fedmitr_flwr.settings import DataSettings, SettingsError
from fedmitr_flwr.settings.home import expand

log = logging.getLogger("fedmitr.data")

# Names of splits in any case; a class of one of these names is a split that was taken for a class.
SPLIT_NAMES = frozenset(
    ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation", "holdout")
)


@dataclass(frozen=True)
class Source:
    """The images of a run.

    Attributes
    ----------
    spec
        Classes, size and normalisation.
    train, validation, test
        Disjoint sets. Clients train on parts of `train` only. Settings are chosen on `validation`, and results are
        reported on `test`.
    found
        The line of the log that says what the source has and what is not used.
    """

    spec: ImageSpec
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    found: str = field(default="", kw_only=True)


def load_source(settings: DataSettings, *, data_path: str | None = None) -> Source:
    """Load the images that `data.source` names, or those of another path.

    Parameters
    ----------
    settings
        Source, classes, size, normalisation and splits.
    data_path
        A folder or ``.npz`` file to load instead of `data.source`; may begin with ``folder:`` or ``npz:``.

    Raises
    ------
    SettingsError
        If the source cannot be read or does not fit the settings; the message names the key or file.
    """
    origin = Origin("data-path", data_path) if data_path else Origin("data.source", settings.source)
    raw = _load(settings, origin)
    spec, new_label = build_spec(settings, raw.header)
    labels = new_label[raw.labels]
    kept = np.flatnonzero(labels >= 0)
    split = complete_split(labels[kept], raw.split[kept], settings)
    sets = [_image_set(raw, spec, labels, kept[split == part]) for part in (TRAIN, VALIDATION, TEST)]
    source = Source(spec, *sets)
    _check_images(source, raw.header)
    unused = tuple(name for name, label in zip(raw.header.class_names, new_label, strict=True) if label < 0)
    others = f"{len(labels) - len(kept)} images of {listed(unused, 6)}, because data.classes is {settings.classes}"
    parts = {"training": source.train, "validation": source.validation, "test": source.test}
    return replace(source, found=log_images(origin, spec, parts, (*raw.left_out, *([others] if unused else []))))


def log_images(origin: Origin, spec: ImageSpec, parts: Mapping[str, ImageSet], left_out: Sequence[str]) -> str:
    """Log and return one line: images, classes, shape, splits, and what is left out with the reason.

    The line is a warning if something is left out.
    """
    total = sum(map(len, parts.values()))
    line = (
        f"{origin.key} = {origin.value}: {total} images of {spec.num_classes} classes ({listed(spec.class_names, 6)}), "
        f"{spec.channels} channels, {spec.image_size} x {spec.image_size} pixels; "
        f"{', '.join(f'{len(images)} {name}' for name, images in parts.items())}; "
        f"left out: {', '.join(left_out) or 'nothing'}"
    )
    log.log(logging.WARNING if left_out else logging.INFO, "%s", line)
    return line


def load_spec(settings: DataSettings) -> ImageSpec:
    """Return the spec that `load_source` would return, but read only names and shapes.

    With `data.class-names` the source itself may be missing if its geometry is known: for built-in sources, Hub
    datasets with a preset, and folders.

    Raises
    ------
    SettingsError
        If the source cannot be read or does not fit the settings.
    """
    origin = Origin("data.source", settings.source)
    names = given_names(settings)
    geometry = known_geometry(settings)
    kind, path = split_origin(origin)
    if settings.source in BUILTIN:
        header = builtin_header(origin)
    elif names and geometry and (kind == "hub" or not path.is_dir()):
        _check_count(settings, names)
        header = Header(origin, names, True, geometry)
    elif kind == "npz":
        header = npz_header(path, origin)
    elif kind == "folder":
        header = folder_header(path, origin)
    else:
        header = _load(settings, origin).header
    return build_spec(settings, header)[0]


def build_spec(settings: DataSettings, header: Header) -> tuple[ImageSpec, Labels]:
    """Apply the settings to the classes and geometry of a source.

    Returns
    -------
    spec
        Classes, size and normalisation of the run.
    new_label
        ``(classes of the source,)`` int64: label in the run of each class of the source, -1 for a class that the run
        does not use.

    Raises
    ------
    SettingsError
        If the settings ask for more classes than the source has, the class names do not fit, a class is called like a
        split, or mean or standard deviation do not have one entry for each channel.
    """
    names, new_label = choose_classes(settings, _named(settings, header))
    _check_names(names, header.origin)
    return ImageSpec(names, *resolve_geometry(settings, header.geometry)), new_label


def resolve_geometry(
    settings: DataSettings, geometry: Geometry
) -> tuple[int, int, tuple[float, ...], tuple[float, ...]]:
    """Return channels, image size, mean and standard deviation, from the settings or else from the source."""
    for key, values in (("data.mean", settings.mean), ("data.std", settings.std)):
        if values and len(values) != geometry.channels:
            allowed = f"must have as many entries as {settings.source} has channels ({geometry.channels})"
            raise SettingsError((key, values, f"{allowed}, but has {len(values)}"))
    return (
        geometry.channels,
        settings.image_size or geometry.image_size,
        settings.mean or geometry.mean,
        settings.std or geometry.std,
    )


def known_geometry(settings: DataSettings) -> Geometry | None:
    """Return the geometry of a source without reading it; None for archives and Hub IDs without a preset."""
    if settings.source in BUILTIN:
        return BUILTIN[settings.source]
    kind, _, rest = settings.source.partition(":")
    preset = find_preset(rest) if kind == "hub" else None
    return FOLDER if kind == "folder" else preset.geometry if preset else None


def split_origin(origin: Origin) -> tuple[str, Path]:
    """Return kind and path of a source; a path without a kind is an archive if it ends in .npz, else a folder.

    Raises
    ------
    SettingsError
        If the path cannot be used (`expand`).
    """
    kind, colon, rest = origin.value.partition(":")
    if not colon or kind not in ("npz", "folder", "hub"):
        kind, rest = "", origin.value
    try:
        path = expand(rest)
    except SettingsError as error:
        raise origin.error(error.problems[0][2]) from None
    return kind or ("npz" if path.suffix.lower() == ".npz" else "folder"), path


def _load(settings: DataSettings, origin: Origin) -> RawSource:
    if origin.key == "data.source" and origin.value in BUILTIN:
        return load_builtin(origin)
    kind, path = split_origin(origin)
    if kind == "hub":
        return load_hub(origin.value.partition(":")[2], origin, settings)
    return load_npz(path, origin) if kind == "npz" else load_folder(path, origin, known=given_names(settings))


def _named(settings: DataSettings, header: Header) -> Header:
    """Return the header; label numbers count as names if renaming them by position could exchange classes.

    A site without class names is matched by its label numbers. The settings may therefore rename only the numbers 0 to
    C-1, and a given name that is itself one of the numbers means this number.
    """
    positions = header.class_names == tuple(str(number) for number in range(len(header.class_names)))
    renamed = not any(name in header.class_names for name in given_names(settings))
    return header if header.named or (positions and renamed) else replace(header, named=True)


def _check_names(names: tuple[str, ...], origin: Origin) -> None:
    """Refuse classes that are called like splits: their images are those of a split that was taken for a class.

    A single class may be called "train", which is a vehicle in CIFAR-100 and other datasets, or "valid". Two or more
    names are also refused if they differ only in the name of a split, as seg_train and seg_test.
    """
    rests: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        words = [word for word in re.split(r"[\W_]+", name.casefold()) if word]
        rest = tuple(word for word in words if word not in SPLIT_NAMES)
        if len(rest) + 1 == len(words):
            rests.setdefault(rest, []).append(name)
    single = [name for name in rests.get((), []) if name.casefold() not in ("train", "valid")]
    splits = single or next((found for found in rests.values() if len(found) > 1), [])
    if splits:
        raise origin.error(
            f"has classes that are called like splits: {listed(splits, 6)}; the images of a split must be divided "
            "into classes, as in train/cat and test/cat; rename the class if it is one"
        )


def _check_images(source: Source, header: Header) -> None:
    """Refuse a source without a test set, or with classes from which nothing can be learned."""
    spec, origin = source.spec, header.origin
    counts = source.train.histogram(spec.num_classes)
    if np.count_nonzero(counts) < 2:
        raise origin.error("has training images of fewer than two classes; a run needs at least two")
    if not header.declared and 2 * spec.num_classes > sum(map(len, (source.train, source.validation, source.test))):
        raise origin.error(
            f"has {spec.num_classes} different labels ({listed(spec.class_names, 6)}) for its images, fewer than two "
            "images a label; labels must be classes and not identifiers or measurements"
        )
    empty = [name for name, count in zip(spec.class_names, counts, strict=True) if count == 0]
    if empty:
        raise origin.error(
            f"has no training image of {len(empty)} of its {spec.num_classes} classes: {listed(empty, 6)}; "
            "give each class a training image, or remove it from the class names"
        )
    if len(source.test) == 0:
        raise origin.error("has no image for the test set; add images or a test split")


def _image_set(raw: RawSource, spec: ImageSpec, labels: Labels, rows: Labels) -> ImageSet:
    return ImageSet(
        labels=labels[rows],
        reader=raw.reader,
        rows=rows,
        channels=spec.channels,
        image_size=spec.image_size,
        columns={name: column[rows] for name, column in raw.columns.items()},
    )


def _check_count(settings: DataSettings, names: tuple[str, ...]) -> None:
    preset = find_preset(settings.source.partition(":")[2])
    expected = settings.classes or (preset.classes if preset else len(names))
    if len(names) != expected:
        allowed = f"must name {expected} classes, but names {len(names)}"
        raise SettingsError(("data.class-names", settings.class_names, allowed))
