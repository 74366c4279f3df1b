"""Datasets of the Hugging Face Hub (`hub:ID`) and local copies of them (`hub:PATH`).

A local copy is a folder that ``save_to_disk`` of `datasets` wrote, or a folder of Parquet files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmitr_flwr.data.images import Column
from fedmitr_flwr.data.presets import FOLDER, Geometry, Preset, default_geometry, find_preset
from fedmitr_flwr.data.sources.decode import DECODE_ERRORS, fit_image
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, VALIDATION, Header, Origin, RawSource
from fedmitr_flwr.settings import DataSettings, SettingsError

if TYPE_CHECKING:
    from datasets import Dataset

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
    """

    table: Dataset = field(repr=False)
    column: str
    origin: Origin

    def read(self, rows: NDArray[np.int64], channels: int, size: int) -> Tensor:
        """Decode the images of these rows.

        Raises
        ------
        SettingsError
            If an image cannot be decoded.
        """
        out = np.empty((len(rows), channels, size, size), np.uint8)
        try:
            for slot, image in enumerate(self.table[rows.tolist()][self.column] if len(rows) else []):
                if image is None:
                    raise ValueError("the image is empty")
                out[slot] = fit_image(image, channels, size)
        except DECODE_ERRORS as error:
            raise self.origin.error(f"an image among the rows {rows.tolist()} cannot be read: {error}") from None
        return torch.from_numpy(out)


def load_hub(name: str, origin: Origin, settings: DataSettings) -> RawSource:
    """Open a dataset; without a preset, a few images are decoded to find their size.

    Without a preset, the splits test, validation, valid and val are used in this order: the first that exists is the
    test set, the second the validation set. A split whose labels are withheld (-1) is ignored.

    Raises
    ------
    SettingsError
        If the dataset cannot be loaded or does not have a required split or column.
    """
    import datasets

    preset = find_preset(name)
    splits = _open(name, origin)
    if _train_name(preset) not in splits:
        raise origin.error(f"has no split {_train_name(preset)!r}; its splits are: {', '.join(splits)}")
    train = splits[_train_name(preset)]
    image_column = _image_column(train, settings, preset)
    label_column = _label_column(train, settings, preset, image_column)
    parts = _parts(splits, {"data.image-column": image_column, "data.label-column": label_column}, preset, origin)
    tables = list(parts.values())
    values = np.concatenate([_values(table, label_column) for table in tables])
    names, named, labels = _classes(train, label_column, values, preset, origin)
    images = datasets.concatenate_datasets([_images(table, image_column) for table in tables])
    geometry = preset.geometry if preset else _probe(images, image_column, origin)
    split = np.concatenate([np.full(len(table), part, np.int8) for part, table in parts.items()])
    return RawSource(
        Header(origin, names, named, geometry),
        HubReader(images, image_column, origin),
        labels,
        split,
        _other_columns(tables, {image_column, label_column}),
    )


def _open(name: str, origin: Origin) -> dict[str, Dataset]:
    import datasets

    path = Path(name).expanduser()
    local = path.is_dir()
    if not local and name.startswith(("/", ".", "~")):
        raise origin.error(f"the folder {path} does not exist")
    try:
        saved = local and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file())
        found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path) if local else name)
    # `datasets` raises exceptions of many libraries here (no connection, missing, gated, old scripts).
    except Exception as error:
        what = "check the files" if local else "check the ID and the network, or use hub:PATH with a local copy"
        reason = str(error).strip().split("\n")[0]
        raise origin.error(f"cannot be loaded ({type(error).__name__}: {reason}); {what}") from error
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


def _train_name(preset: Preset | None) -> str:
    return preset.train if preset else "train"


def _images(table: Dataset, column: str) -> Dataset:
    import datasets

    # A dataset may have been saved with decoding of its image column turned off.
    images = table.select_columns([column])
    return images if images.features[column].decode else images.cast_column(column, datasets.Image())


def _parts(
    splits: dict[str, Dataset], columns: dict[str, str], preset: Preset | None, origin: Origin
) -> dict[int, Dataset]:
    """Return the table of each split, without splits whose labels are withheld."""
    label = columns["data.label-column"]
    if preset:
        wanted = [name for name in (preset.test, preset.validation) if name]
    else:
        wanted = ["test", "validation", "valid", "val"]
    parts = {TRAIN: splits[_train_name(preset)]}
    for name in wanted:
        table = splits.get(name)
        if table is None:
            continue
        for key, column in columns.items():
            if column not in table.column_names:
                raise SettingsError(
                    (key, column, f"must be a column of the split {name!r}; its columns are: {_list(table)}")
                )
        withheld = _is_number(table, label) and len(table) > 0 and _values(table, label).max() < 0
        if not withheld and len(parts) < 3:
            parts[TEST if TEST not in parts else VALIDATION] = table
    if preset and preset.test and TEST not in parts:
        raise origin.error(f"has no labelled split {preset.test!r}; its splits are: {', '.join(splits)}")
    return parts


def _image_column(table: Dataset, settings: DataSettings, preset: Preset | None) -> str:
    import datasets

    candidates = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    chosen = settings.image_column or (preset.image_column if preset else "")
    if not chosen and len(candidates) == 1:
        return str(candidates[0])
    if chosen not in candidates:
        allowed = f"must be an image column of {settings.source}; its image columns are: "
        raise SettingsError(
            ("data.image-column", chosen, allowed + (", ".join(candidates) or "none") + f" (all: {_list(table)})")
        )
    return chosen


def _label_column(table: Dataset, settings: DataSettings, preset: Preset | None, image: str) -> str:
    import datasets

    chosen = settings.label_column or (preset.label_column if preset else "")
    if not chosen:
        usual = [name for name in ("label", "labels") if name in table.column_names]
        classes = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
        chosen = usual[0] if usual else classes[0] if len(classes) == 1 else ""
    if chosen not in table.column_names or chosen == image or not _is_scalar(table, chosen):
        allowed = f"must be the label column of {settings.source}; its columns are: {_list(table)}"
        raise SettingsError(("data.label-column", chosen, allowed))
    return chosen


def _classes(
    train: Dataset, column: str, values: NDArray[np.generic], preset: Preset | None, origin: Origin
) -> tuple[tuple[str, ...], bool, NDArray[np.int64]]:
    """Return class names, whether they come with the data, and labels ``(N,)`` int64."""
    if values.dtype.kind not in "iubU":
        raise origin.error(f"has images without a label in the column {column!r}")
    if not _is_number(train, column):
        names, labels = np.unique(values.astype(str), return_inverse=True)
        return tuple(names.tolist()), True, labels.astype(np.int64)
    labels = values.astype(np.int64)
    if labels.min() < 0:
        raise origin.error(
            f"has images with the label {labels.min()} in the column {column!r}; labels must be 0 or above"
        )
    known = getattr(train.features[column], "names", None)
    if known:
        return tuple(str(name) for name in known), True, labels
    count = max(int(labels.max()) + 1, preset.classes if preset else 0)
    return tuple(str(label) for label in range(count)), False, labels


def _other_columns(tables: list[Dataset], taken: set[str]) -> dict[str, Column]:
    """Return the columns for `partition.kind = natural`: strings, integers, and classes by their names."""
    columns: dict[str, Column] = {}
    for name in tables[0].column_names:
        if name in taken or any(name not in t.column_names or not _is_scalar(t, name) for t in tables):
            continue
        values = np.concatenate([_values(table, name) for table in tables])
        names = getattr(tables[0].features[name], "names", None)
        if names and values.dtype.kind in "iu" and values.min() >= 0:
            values = np.asarray(names)[values]
        if values.dtype.kind in "iuU":
            columns[name] = values
    return columns


def _probe(table: Dataset, column: str, origin: Origin) -> Geometry:
    rows = np.unique(np.linspace(0, len(table) - 1, PROBED_IMAGES).astype(np.int64))
    try:
        images = table[rows.tolist()][column]
    except DECODE_ERRORS as error:
        raise origin.error(f"an image among the rows {rows.tolist()} cannot be read: {error}") from None
    channels = 1 if all(image.mode in ("1", "L") or image.mode.startswith("I") for image in images) else 3
    sizes = {image.size for image in images}
    width, height = min(sizes)
    native = len(sizes) == 1 and width == height and width <= LARGEST_NATIVE_SIZE
    return default_geometry(channels, width if native else FOLDER.image_size)


def _values(table: Dataset, column: str) -> NDArray[np.generic]:
    return np.asarray(table.select_columns([column]).with_format("numpy")[:][column])


def _is_scalar(table: Dataset, column: str) -> bool:
    return _is_number(table, column) or getattr(table.features[column], "dtype", "") in ("string", "large_string")


def _is_number(table: Dataset, column: str) -> bool:
    return str(getattr(table.features[column], "dtype", "")).startswith(("int", "uint", "bool"))


def _list(table: Dataset) -> str:
    return ", ".join(table.column_names)
