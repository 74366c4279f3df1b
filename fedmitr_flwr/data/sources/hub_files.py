"""Local folders of Parquet and Arrow files, whose class names may differ from file to file.

`datasets` reads the class names of one file and takes the numbers in all others as positions in them. Without a check,
the images of a split would silently get the labels of other classes. It also puts every file into the split ``train``
whose name it does not know as that of a split, such as ``TEST.parquet``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedmitr_flwr.data.sources.labels import LabelError, first_few
from fedmitr_flwr.data.sources.names import is_held_out, shown

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("fedmitr.data")

Names = tuple[str, ...] | None
# Files with many images each.
_TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".tar")


def load_files(folder: Path) -> dict[str, Dataset]:
    """Load the splits of a folder that ``save_to_disk`` did not write as a whole.

    Each folder in it may be a dataset that ``save_to_disk`` has written; it is a split of the folder's name.

    Raises
    ------
    LabelError
        If two files have different class names for a column, or if a file whose name is that of a split for testing or
        validation is read as training data or not at all. `datasets` raises other exceptions.
    """
    import datasets

    saved = sorted(path.parent for path in folder.glob("*/state.json"))
    if saved:
        return {path.name: datasets.load_from_disk(str(path)) for path in saved}
    splits = dict(datasets.load_dataset(str(folder)))
    builder = datasets.load_dataset_builder(str(folder))
    read = {name: [Path(file) for file in found] for name, found in (builder.config.data_files or {}).items()}
    files = [file for found in read.values() for file in found]
    _check_places(Path(os.path.abspath(folder)), read.get("train", []), files)
    declared = any(info.features for info in datasets.info.DatasetInfosDict.from_directory(str(folder)).values())
    features = next(iter(splits.values())).features
    _check_names(files, {name: _names(kind) for name, kind in features.items()}, declared)
    return splits


def _check_places(folder: Path, training: Iterable[Path], read: Collection[Path]) -> None:
    """Refuse files with the name of a split for testing or validation that are training data or are not read.

    Other files that are not read are logged. Images are checked elsewhere. A card that lists the files of each split is
    believed.

    Parameters
    ----------
    folder
        Absolute path of the dataset.
    training
        Files that `datasets` reads as training data.
    read
        Files of all splits.
    """
    card = folder / "README.md"
    if card.is_file() and "data_files:" in card.read_text("utf-8", "replace").partition("\n---")[0]:
        return
    kinds = {file.suffix for file in read if file.suffix in _TABLES}
    unread = {file for kind in kinds for file in folder.rglob(f"*{kind}")} - set(read)
    unread = {
        file for file in unread if not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    }
    for file in sorted({*training, *unread}):
        parts = file.relative_to(folder).with_suffix("").parts if file.is_relative_to(folder) else (file.stem,)
        if file.suffix in kinds and any(map(is_held_out, parts)):
            what = "does not read" if file in unread else "reads as training data"
            raise LabelError(
                f"has the file {shown(file)}, which `datasets` {what} although its name is that of a split for testing "
                "or validation; name the files train.parquet and test.parquet, in small letters"
            )
    if unread:
        names = first_few([shown(file.relative_to(folder)) for file in sorted(unread)])
        log.warning("hub:%s: left out: %d files that `datasets` does not read (%s)", shown(folder), len(unread), names)


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
