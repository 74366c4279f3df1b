"""Load `data.source` as three disjoint sets: training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmitr_flwr.data.classes import choose_classes, given_names
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
    """

    spec: ImageSpec
    train: ImageSet
    validation: ImageSet
    test: ImageSet


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
    if np.count_nonzero(sets[0].histogram(spec.num_classes)) < 2:
        raise origin.error("has training images of fewer than two classes; a run needs at least two")
    if len(sets[2]) == 0:
        raise origin.error("has no image for the test set; add images or a test split")
    return Source(spec, *sets)


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
        If the settings ask for more classes than the source has, the class names do not fit, or mean or standard
        deviation do not have one entry for each channel.
    """
    names, new_label = choose_classes(settings, header)
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
    """Return kind and path of a source; a path without a kind is an archive if it ends in .npz, else a folder."""
    kind, colon, rest = origin.value.partition(":")
    if colon and kind in ("npz", "folder", "hub"):
        return kind, Path(rest).expanduser()
    path = Path(origin.value).expanduser()
    return "npz" if path.suffix == ".npz" else "folder", path


def _load(settings: DataSettings, origin: Origin) -> RawSource:
    if origin.key == "data.source" and origin.value in BUILTIN:
        return load_builtin(origin)
    kind, path = split_origin(origin)
    if kind == "hub":
        return load_hub(origin.value.partition(":")[2], origin, settings)
    return load_npz(path, origin) if kind == "npz" else load_folder(path, origin)


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
