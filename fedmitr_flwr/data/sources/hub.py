"""Datasets of the Hugging Face Hub (`hub:ID`) and local copies of them (`hub:PATH`).

A local copy is a folder that ``save_to_disk`` of `datasets` wrote, a folder with one of these for each split, or a
folder of Parquet files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedmitr_flwr.data.images import Column
from fedmitr_flwr.data.presets import FOLDER, Geometry, Preset, default_geometry, find_preset
from fedmitr_flwr.data.sources.decode import DECODE_ERRORS, fit_image, has_several, open_image, reason
from fedmitr_flwr.data.sources.depth import Depth, White, depth_of, highest, peaks_of, white_of
from fedmitr_flwr.data.sources.folder import load_folder
from fedmitr_flwr.data.sources.hub_files import load_files
from fedmitr_flwr.data.sources.labels import ALLOWED, LabelColumn, LabelError, match_splits, read_arrow
from fedmitr_flwr.data.sources.names import SplitNamesError, same_name, shown, split_folders
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, VALIDATION, Header, Origin, RawSource
from fedmitr_flwr.settings import DataSettings, SettingsError
from fedmitr_flwr.settings.home import expand

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ChunkedArray

# Without a preset, square images up to this side keep their size. Others are resized to FOLDER.image_size.
LARGEST_NATIVE_SIZE = 128
PROBED_IMAGES = 16


@dataclass(frozen=True)
class HubReader:
    """Reads images from an Arrow table on disk and decodes them in every read.

    Attributes
    ----------
    table
        A `datasets.Dataset`; row i is image i.
    column
        Name of the image column.
    origin
        The setting that named the dataset, for error messages.
    white
        Values of white of the dataset. None: each image is decided alone.
    """

    table: Dataset = field(repr=False)
    column: str
    origin: Origin
    white: White | None = None

    def read(self, rows: NDArray[np.int64], channels: int, size: int) -> Tensor:
        """Decode the images of these rows.

        Raises
        ------
        SettingsError
            If an image cannot be decoded.
        """
        out = np.empty((len(rows), channels, size, size), np.uint8)
        try:
            for slot, cell in enumerate(self.table[rows.tolist()][self.column] if len(rows) else []):
                with _open_cell(cell) as image:
                    out[slot] = fit_image(image, channels, size, self.white)
        except DECODE_ERRORS as error:
            raise self.origin.error(
                f"an image among the rows {rows.tolist()} cannot be read: {reason(error)}"
            ) from None
        return torch.from_numpy(out)


def load_hub(name: str, origin: Origin, settings: DataSettings) -> RawSource:
    """Open a dataset; without a preset, a few images are decoded to find their size.

    Without a preset, the splits test, validation, valid and val are used in this order: the first that exists is the
    test set, the second the validation set. Names of splits may be in capitals. If there is no split train or none of
    these, `names.split_folders` finds the splits by their names. A split without any label is not used.
    The classes are those of the training split; the labels of the other splits are matched to them by name.

    Raises
    ------
    SettingsError
        If the dataset cannot be loaded, does not have a required split or column, or if labels do not name one class
        for each image.
    """
    preset = find_preset(name)
    splits = _open(name, origin)
    wanted = preset.train if preset else "train"
    by_name = {} if preset else _splits_by_name(splits)
    train_name = _find(splits, wanted) or by_name.get(TRAIN)
    if train_name is None:
        raise origin.error(f"has no split {wanted!r}; its splits are: {', '.join(splits)}")
    if len(splits[train_name]) == 0:
        raise origin.error(f"has no image in the split {train_name!r}")
    image_column = _image_column(splits[train_name], settings, preset)
    label_column = _label_column(splits[train_name], settings, preset, image_column)
    chosen, left_out = _used_splits(splits, train_name, preset, by_name)
    names = {"data.image-column": image_column, "data.label-column": label_column}
    labels: dict[str, LabelColumn] = {}
    for split in chosen:
        _check_columns(splits[split], split, names)
        column = _labels(splits[split], label_column, split, settings)
        if split != train_name and column.missing == len(column.rows):
            left_out.append(f"the split {split} ({len(column.rows)} images without labels)")
        else:
            labels[split] = column
    raw = _joined(splits, labels, names, preset, origin, tuple(left_out))
    if splits[train_name].builder_name == "imagefolder":
        _check_image_folder(raw, name, origin)
    return raw


def _joined(
    splits: dict[str, Dataset],
    labels: dict[str, LabelColumn],
    columns: dict[str, str],
    preset: Preset | None,
    origin: Origin,
    left_out: tuple[str, ...],
) -> RawSource:
    """Join the training split and at most two other splits, of which the first is the test set."""
    import datasets

    image_column, label_column = columns["data.image-column"], columns["data.label-column"]
    if preset and preset.test and not any(_same(split, preset.test) for split in labels):
        raise origin.error(f"has no labelled split {preset.test!r}; its splits are: {', '.join(splits)}")
    used, spare = list(labels)[:3], list(labels)[3:]
    left_out += tuple(f"the split {split} ({len(labels[split].rows)} images)" for split in spare)
    try:
        for split in used:
            labels[split].check_complete()
        names, named, numbers = match_splits({split: labels[split] for split in used})
    except LabelError as error:
        raise SettingsError(("data.label-column", label_column, f"the column of {origin.value} {error}")) from None
    if preset and not named and int(names[-1]) < preset.classes:
        # A preset knows how many classes there are, also those of which a copy has no image.
        numbers = [np.array([int(name) for name in names], np.int64)[rows] for rows in numbers]
        names = tuple(str(number) for number in range(preset.classes))
    tables = [splits[split] for split in used]
    images = datasets.concatenate_datasets([_images(table, image_column, origin) for table in tables])
    probes = _probe(images, image_column, origin)
    geometry = preset.geometry if preset else _geometry(probes)
    if any(probe.several for probe in probes):
        left_out += ("all but the first picture of images with several",)
    parts = zip((TRAIN, TEST, VALIDATION), tables, strict=False)
    return RawSource(
        Header(origin, names, named, geometry, labels[used[0]].listed or preset is not None),
        HubReader(images, image_column, origin, _white(images, image_column, probes, origin)),
        np.concatenate(numbers),
        np.concatenate([np.full(len(table), part, np.int8) for part, table in parts]),
        _other_columns(tables, {image_column, label_column}),
        left_out,
    )


def _check_image_folder(raw: RawSource, name: str, origin: Origin) -> None:
    """Refuse a folder of image files in which `datasets` finds other images or splits than the reader of folders.

    `datasets` leaves out files by their ending, links to folders and what it may not read, and knows fewer names of
    splits. Class folders with a table of metadata or in an archive are not checked.
    """
    path = expand(name, origin.key)
    first = raw.reader.table[0][raw.reader.column]["path"] if isinstance(raw.reader, HubReader) else None
    tables = [file for pattern in ("metadata.*", "*/metadata.*") for file in path.glob(pattern)]
    if not path.is_dir() or tables or not first or not Path(first).is_file():
        return
    folder = load_folder(path, origin)
    if _numbers(raw) != _numbers(folder):
        raise origin.error(
            f"as a Hub dataset this folder has {_counted(raw)}, but its files are {_counted(folder)}; "
            f"use folder:{shown(path)}"
        )


def _numbers(raw: RawSource) -> Counter[tuple[int, str]]:
    """Count the images of each split and class."""
    names = [same_name(name) for name in raw.header.class_names]
    return Counter((part, names[label]) for part, label in zip(raw.split.tolist(), raw.labels.tolist(), strict=True))


def _counted(raw: RawSource) -> str:
    parts = ((TRAIN, "training"), (TEST, "test"), (VALIDATION, "validation"))
    return ", ".join(f"{np.count_nonzero(raw.split == part)} {name} images" for part, name in parts)


def _open(name: str, origin: Origin) -> dict[str, Dataset]:
    import datasets

    path = expand(name, origin.key)
    local = path.is_dir()
    if not local and name.startswith(("/", ".", "~")):
        raise origin.error(f"the folder {path} does not exist")
    try:
        if local and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
            found = datasets.load_from_disk(str(path))
        else:
            found = load_files(path) if local else datasets.load_dataset(name)
    except LabelError as error:
        raise origin.error(str(error)) from None
    # `datasets` raises exceptions of many libraries here (no connection, missing, gated, old scripts).
    except Exception as error:
        what = "check the files" if local else "check the ID and the network, or use hub:PATH with a local copy"
        reason = str(error).strip().split("\n")[0]
        raise origin.error(f"cannot be loaded ({type(error).__name__}: {reason}); {what}") from error
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


def _find(splits: Iterable[str], wanted: str) -> str | None:
    """Return the split of this name, or else one that differs from it only by capitals."""
    there = [split for split in splits if _same(split, wanted)]
    return wanted if wanted in there else there[0] if there else None


def _same(split: str, wanted: str) -> bool:
    return split.casefold() == wanted.casefold()


def _splits_by_name(splits: Iterable[str]) -> dict[int, str]:
    """Return the splits that are recognised by words in their names; empty if these do not tell."""
    try:
        return split_folders(list(splits))
    except SplitNamesError:
        return {}


def _used_splits(
    splits: dict[str, Dataset], train: str, preset: Preset | None, by_name: Mapping[int, str]
) -> tuple[list[str], list[str]]:
    """Return the splits that may be used, the training split first, and a phrase for each other split."""
    wanted = [preset.test, preset.validation] if preset else ["test", "validation", "valid", "val"]
    found = [train]
    for name in wanted:
        split = _find(splits, name) if name else None
        if split and split not in found and len(splits[split]):
            found.append(split)
    if len(found) == 1 and by_name.get(TRAIN) == train:
        found += [by_name[part] for part in (TEST, VALIDATION) if part in by_name and len(splits[by_name[part]])]
    return found, [f"the split {name} ({len(table)} images)" for name, table in splits.items() if name not in found]


def _check_columns(table: Dataset, split: str, columns: dict[str, str]) -> None:
    for key, column in columns.items():
        if column not in table.column_names:
            allowed = f"must be a column of the split {split!r}; its columns are: {_list(table)}"
            raise SettingsError((key, column, allowed))


def _images(table: Dataset, column: str, origin: Origin) -> Dataset:
    """Return the image column alone, as encoded files, which every read decodes; refuse it if images are missing."""
    import datasets
    from pyarrow import compute

    images = table.select_columns([column])
    kind = images.features[column]
    reason = _not_images(kind)
    if reason:
        raise SettingsError(("data.image-column", column, f"the column of {origin.value} {reason}"))
    # `datasets` itself would decode an image without telling how many bits it had. The column may also be one of bytes.
    if not isinstance(kind, datasets.Image) or kind.decode:
        images = images.cast_column(column, datasets.Image(decode=False))
    if images._indices is None:
        stored = images.data.column(column)
        empty = compute.is_null(stored)
        fields = [compute.is_null(compute.struct_field(stored, name)) for name in ("bytes", "path")]
        missing = np.flatnonzero(compute.or_(empty, compute.and_(*fields)).to_numpy())
        if missing.size:
            allowed = f"the column of {origin.value} has no image in {missing.size} of {len(images)} rows"
            raise SettingsError(("data.image-column", column, f"{allowed} (row {missing[0]} is the first)"))
    return images


def _not_images(kind: object) -> str:
    """Return why a column of this type cannot be read as images; empty if it can."""
    import datasets

    if isinstance(kind, datasets.Image) or getattr(kind, "dtype", "") in ("binary", "large_binary"):
        return ""
    if isinstance(kind, dict) and "bytes" in kind and set(kind) <= {"bytes", "path"}:
        return ""
    allowed = "must hold one image a row: the feature Image, or the bytes of an image file"
    more = "; arrays of pixels can be read from an archive, see npz:PATH" if _is_nested(kind) else ""
    return f"holds {_kind(kind)}, but {allowed}{more}"


def _is_nested(kind: object) -> bool:
    return type(kind).__name__ in ("Array2D", "Array3D", "List", "LargeList", "Sequence")


def _kind(kind: object) -> str:
    """Return the type of a column as `datasets` writes it, such as ``Value('string')``."""
    text = str(kind)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _image_column(table: Dataset, settings: DataSettings, preset: Preset | None) -> str:
    import datasets

    there = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    candidates = there or [name for name, kind in table.features.items() if not _not_images(kind)]
    chosen = settings.image_column or (preset.image_column if preset else "")
    if not chosen and len(candidates) == 1:
        return str(candidates[0])
    reason = _not_images(table.features[chosen]) if chosen in table.column_names else "no such column"
    if reason:
        allowed = f"must be an image column of {settings.source}; its image columns are: "
        allowed += (", ".join(candidates) or "none") + f" (all: {_list(table)})"
        raise SettingsError(
            ("data.image-column", chosen, f"{allowed}; {chosen} {reason}" if chosen in table.column_names else allowed)
        )
    return chosen


def _label_column(table: Dataset, settings: DataSettings, preset: Preset | None, image: str) -> str:
    import datasets

    chosen = settings.label_column or (preset.label_column if preset else "")
    if not chosen:
        usual = [name for name in ("label", "labels") if name in table.column_names]
        classes = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
        chosen = usual[0] if usual else classes[0] if len(classes) == 1 else ""
    if chosen not in table.column_names or chosen == image:
        allowed = f"must be the label column of {settings.source}; its columns are: {_list(table)}"
        raise SettingsError(("data.label-column", chosen, allowed))
    return chosen


def _labels(table: Dataset, column: str, split: str, settings: DataSettings) -> LabelColumn:
    kind = table.features[column]
    # The feature of a list is the list itself or its `feature`, depending on the version of `datasets`.
    inner = getattr(kind, "feature", None) or (kind[0] if isinstance(kind, list) and kind else kind)
    try:
        if isinstance(kind, dict):
            raise LabelError(f"holds values with several fields ({', '.join(kind)}); {ALLOWED}")
        return read_arrow(_arrow(table, column), getattr(inner, "names", None))
    except LabelError as error:
        allowed = f"the column of {settings.source} {error} (split {split!r}; the columns are: {_list(table)})"
        raise SettingsError(("data.label-column", column, allowed)) from None


def _arrow(table: Dataset, column: str) -> ChunkedArray:
    """Return a column without its feature's decoding."""
    return table.select_columns([column]).with_format("arrow")[:].column(column)


def _other_columns(tables: list[Dataset], taken: set[str]) -> dict[str, Column]:
    """Return the columns for `partition.kind = natural`: strings, integers, and classes by their names."""
    columns: dict[str, Column] = {}
    for name in tables[0].column_names:
        if name in taken or any(name not in t.column_names or not _is_scalar(t, name) for t in tables):
            continue
        # Each split may have its own list of names.
        parts = [_values(table, name) for table in tables]
        if all(part.dtype.kind in "iuU" for part in parts):
            columns[name] = np.concatenate(parts)
    return columns


@dataclass(frozen=True)
class _Probe:
    """Properties of one image: how its pixels are stored, mode in PIL, size, and whether there are several pictures."""

    depth: Depth
    mode: str
    size: tuple[int, int]
    several: bool


def _probe(table: Dataset, column: str, origin: Origin) -> list[_Probe]:
    """Decode a few images, evenly spread over a table."""
    rows = np.unique(np.linspace(0, len(table) - 1, PROBED_IMAGES).astype(np.int64)).tolist()
    found = []
    try:
        for cell in table[rows][column]:
            with _open_cell(cell) as image:
                depth = depth_of(image)
                image.load()
                found.append(_Probe(depth, image.mode, image.size, has_several(image)))
    except DECODE_ERRORS as error:
        raise origin.error(f"an image among the rows {rows} cannot be read: {reason(error)}") from None
    return found


def _geometry(probes: list[_Probe]) -> Geometry:
    channels = 1 if all(probe.mode in ("1", "L") or probe.mode.startswith("I") for probe in probes) else 3
    sizes = {probe.size for probe in probes}
    width, height = min(sizes)
    native = len(sizes) == 1 and width == height and width <= LARGEST_NATIVE_SIZE
    return default_geometry(channels, width if native else FOLDER.image_size)


def _white(table: Dataset, column: str, probes: list[_Probe], origin: Origin) -> White:
    """Decide the value of white of images of more than 8 bits; all images are decoded if one of a few is of these."""
    if all(probe.depth is Depth.EIGHT for probe in probes):
        return White()
    peaks = []
    for row in range(len(table)):
        try:
            with _open_cell(table[row][column]) as image:
                depth = depth_of(image)
                image.load()
                peaks.append(peaks_of(image, depth))
        except DECODE_ERRORS as error:
            raise origin.error(f"the image in row {row} cannot be read: {reason(error)}") from None
    try:
        return white_of(highest(peaks))
    except ValueError as error:
        raise origin.error(str(error)) from None


def _open_cell(cell: Mapping[str, Any] | None) -> Image.Image:
    """Open an encoded image: its bytes, a local file, or a path that only `datasets` can open, as in an archive."""
    import datasets

    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise ValueError("the image is missing")
    if cell["bytes"] is not None:
        return open_image(BytesIO(cell["bytes"]))
    if Path(cell["path"]).is_file():
        return open_image(Path(cell["path"]))
    image: Image.Image = datasets.Image().decode_example(dict(cell))
    return image


def _values(table: Dataset, column: str) -> NDArray[np.generic]:
    values: NDArray[np.generic] = np.asarray(table.select_columns([column]).with_format("numpy")[:][column])
    names = getattr(table.features[column], "names", None)
    if names and values.dtype.kind in "iu" and values.size and values.min() >= 0 and values.max() < len(names):
        values = np.asarray(names)[values]
    return values


def _is_scalar(table: Dataset, column: str) -> bool:
    kind = str(getattr(table.features[column], "dtype", ""))
    return kind.startswith(("int", "uint", "bool")) or kind in ("string", "large_string")


def _list(table: Dataset) -> str:
    return ", ".join(table.column_names)
