"""Local folders of Parquet and Arrow files, whose class names may differ from file to file.

`datasets` reads the class names of one file and takes the numbers in all others as positions in them. Without a check,
the images of a split would silently get the labels of other classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedmitr_flwr.data.sources.labels import LabelError, first_few

if TYPE_CHECKING:
    from datasets import Dataset

Names = tuple[str, ...] | None


def load_files(folder: Path) -> dict[str, Dataset]:
    """Load the splits of a folder that ``save_to_disk`` did not write as a whole.

    Each folder in it may be a dataset that ``save_to_disk`` has written; it is a split of the folder's name.

    Raises
    ------
    LabelError
        If two files have different class names for a column. `datasets` raises other exceptions.
    """
    import datasets

    saved = sorted(path.parent for path in folder.glob("*/state.json"))
    if saved:
        return {path.name: datasets.load_from_disk(str(path)) for path in saved}
    splits = dict(datasets.load_dataset(str(folder)))
    builder = datasets.load_dataset_builder(str(folder))
    files = [Path(file) for found in (builder.config.data_files or {}).values() for file in found]
    declared = any(info.features for info in datasets.info.DatasetInfosDict.from_directory(str(folder)).values())
    features = next(iter(splits.values())).features
    _check_names(files, {name: _names(kind) for name, kind in features.items()}, declared)
    return splits


def _check_names(files: Iterable[Path], loaded: Mapping[str, Names], declared: bool) -> None:
    """Compare the class names in each file with those that were loaded, which a card may declare for all files."""
    for file in files:
        if file.suffix not in (".parquet", ".arrow"):
            continue
        own = _names_in(file)
        for column, names in loaded.items():
            there = own.get(column)
            if there != names and not (there is None and declared):
                raise LabelError(
                    f"has files with different class names for the column {column!r}: {_told(there)} in {file.name} "
                    f"and {_told(names)} elsewhere; give all files the same names, or use save_to_disk for the splits"
                )


def _names_in(file: Path) -> dict[str, Names]:
    """Return the class names of each column that has them, from what `datasets` has written into the file's schema."""
    import pyarrow as pa
    from pyarrow import parquet

    if file.suffix == ".parquet":
        metadata = parquet.read_schema(file).metadata
    else:
        with pa.memory_map(str(file)) as source:
            metadata = pa.ipc.open_stream(source).schema.metadata
    text = (metadata or {}).get(b"huggingface")
    features = json.loads(text)["info"]["features"] if text else {}
    return {name: _names(kind) for name, kind in features.items()}


def _names(kind: object) -> Names:
    """Return the class names of a feature or of its list's entries, from `datasets` or JSON; None without names."""
    inner = kind.get("feature") if isinstance(kind, dict) else getattr(kind, "feature", None)
    kind = inner or kind
    names = kind.get("names") if isinstance(kind, dict) else getattr(kind, "names", None)
    return tuple(map(str, names)) if isinstance(names, list) else None


def _told(names: Names) -> str:
    return first_few(names) if names else "no names"
