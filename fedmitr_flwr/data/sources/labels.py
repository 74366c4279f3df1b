"""Read labels of any type from a table or an array, and match the labels of splits with each other.

A label is accepted if it names exactly one class: a whole number from 0 (as an integer, a float or a boolean), a text,
a list with one entry, or a one-hot row. Numbers are not positions: labels 3, 77 and 900 are three classes. Time and
memory depend on the number of images and not on the values of their labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.data.images import Labels
from fedmitr_flwr.data.sources.names import almost, positions

if TYPE_CHECKING:
    import pyarrow

ALLOWED = "a label is a whole number from 0, a text, or a one-hot row"
_LARGEST_EXACT = {"float16": 2**11, "float32": 2**24}
_SHOWN = 6


class LabelError(ValueError):
    """Labels that do not name one class for each image; the message is a phrase that follows the column's name."""


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one split.

    Attributes
    ----------
    values
        Distinct labels, all numbers or all texts. Ascending, or in the order of a list of class names.
    rows
        ``(N,)`` int64: position of each image's label in `values`, -1 for an image without a label.
    listed
        Whether `values` is a list of class names that the data declares. It may have names without an image.
    unlabelled
        One of the values that stand for a missing label, as text.
    """

    values: tuple[int, ...] | tuple[str, ...]
    rows: Labels
    listed: bool = False
    unlabelled: str = ""

    @property
    def numbers(self) -> bool:
        """Whether the labels are numbers without names."""
        return not self.listed and not any(isinstance(value, str) for value in self.values)

    @property
    def missing(self) -> int:
        """Number of images without a label: the value is missing, empty or below 0."""
        return int(np.count_nonzero(self.rows < 0))

    def check_complete(self) -> None:
        """Raise a `LabelError` if an image has no label."""
        if self.missing:
            first = int(np.flatnonzero(self.rows < 0)[0])
            raise LabelError(
                f"has no label for {self.missing} of {len(self.rows)} images (row {first} is the first; a missing "
                f"label is empty, None, NaN or below 0, here {self.unlabelled})"
            )

    def with_names(self, names: Sequence[str]) -> LabelColumn:
        """Return the same labels as positions in a list of class names.

        Numbers are positions in the list; texts must be among the names.

        Raises
        ------
        LabelError
            If a number is not a position in the list, or a text is not one of the names.
        """
        if self.numbers:
            wrong = [value for value in self.values if not 0 <= int(value) < len(names)]
            if wrong:
                low, high = self.values[0], self.values[-1]
                raise LabelError(f"must have values from 0 to {len(names) - 1}, but has values from {low} to {high}")
            place: dict[int | str, int] = {value: int(value) for value in self.values}
        else:
            texts = [str(value) for value in self.values]
            place = dict(zip(self.values, positions(texts, names).tolist(), strict=True))
            unknown = [text for text in texts if place[text] < 0]
            if unknown:
                hint = almost(unknown[0], names)
                raise LabelError(f"has labels that are not among the class names: {first_few(unknown)}{hint}")
        table = np.array([place[value] for value in self.values] or [0], np.int64)
        rows = np.where(self.rows < 0, -1, table[self.rows])
        return LabelColumn(tuple(names), rows, listed=True, unlabelled=self.unlabelled)


def read_array(array: NDArray[np.generic]) -> LabelColumn:
    """Read the labels of a NumPy array.

    Parameters
    ----------
    array
        ``(N,)`` or ``(N, 1)`` integers, whole floats, booleans or texts, or ``(N, C)`` one-hot rows.

    Raises
    ------
    LabelError
        If the array has another shape or type, or values that are no labels.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2:
        array = _from_one_hot(array)
    if array.ndim != 1 or array.dtype.kind not in "biufSU":
        raise LabelError(f"is {array.dtype} of shape {array.shape}; {ALLOWED}, one for each image")
    exact = _LARGEST_EXACT.get(array.dtype.name, 2**53)
    if array.dtype.kind == "f":
        array = array.astype(np.float64)
    values, rows = np.unique(array, return_inverse=True)
    return _column(values.tolist(), rows.astype(np.int64), exact)


def read_arrow(column: pyarrow.ChunkedArray, names: Sequence[str] | None = None) -> LabelColumn:
    """Read the labels of an Arrow column.

    Parameters
    ----------
    column
        Integers, whole floats, booleans, texts, lists with one of these, or one-hot lists; values may be missing.
    names
        Class names that the integers stand for, if the column has them.

    Raises
    ------
    LabelError
        If the column has another type, or values that are no labels.
    """
    import pyarrow as pa
    from pyarrow import compute

    kind = column.type
    if pa.types.is_dictionary(kind):
        return read_arrow(column.cast(kind.value_type), names)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        there = compute.is_valid(column).to_numpy()
        lists = column.filter(pa.chunked_array([pa.array(there)])).combine_chunks()
        lengths = np.unique(compute.list_value_length(lists).to_numpy(zero_copy_only=False))
        flat = pa.chunked_array([compute.list_flatten(lists)])
        if len(lengths) > 1 or (names and lengths.size and lengths[0] > 1):
            raise LabelError(f"has lists of {lengths[0]} to {lengths[-1]} labels; {ALLOWED}, one for each image")
        if lengths.size == 0 or lengths[0] == 0:
            return LabelColumn((), np.full(len(column), -1, np.int64), unlabelled="an empty list")
        if lengths[0] == 1:
            inner = read_arrow(flat, names)
        elif flat.null_count or not _is_scalar(pa, flat.type):
            raise LabelError(f"holds values of the type {kind}; {ALLOWED}")
        else:
            inner = read_array(flat.to_numpy().reshape(-1, int(lengths[0])))
        rows = np.full(len(column), -1, np.int64)
        rows[there] = inner.rows
        return replace(inner, rows=rows, unlabelled=inner.unlabelled or "None")
    if pa.types.is_null(kind):
        return LabelColumn((), np.full(len(column), -1, np.int64), unlabelled="None")
    if not _is_scalar(pa, kind):
        raise LabelError(f"holds values of the type {kind}; {ALLOWED}")
    codes = column.dictionary_encode().unify_dictionaries().combine_chunks()
    if isinstance(codes, pa.ChunkedArray):  # a column without rows
        return LabelColumn((), np.zeros(0, np.int64))
    rows = codes.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    exact = {pa.float16(): 2**11, pa.float32(): 2**24}.get(kind, 2**53)
    found = _column(codes.dictionary.to_pylist(), rows, exact)
    return found.with_names(names) if names else found


def match_splits(splits: Mapping[str, LabelColumn]) -> tuple[tuple[str, ...], bool, list[Labels]]:
    """Bring the labels of all splits to the classes of the first one, by name (compared by `names.name_key`).

    Parameters
    ----------
    splits
        Labels of each split by its name; the training split first. No label may be missing.

    Returns
    -------
    names
        Class names of the training split; for numbers without names, the numbers in ascending order.
    named
        Whether the names come with the data, and are not numbers.
    labels
        For each split ``(N,)`` int64, positions in `names`.

    Raises
    ------
    LabelError
        If a split has images of a class that the training split does not have, or if one split has numbers and
        another class names for them, so that nothing says which name belongs to a number.
    """
    first, train = next(iter(splits.items()))
    names = tuple(str(value) for value in train.values)
    labels = []
    for split, column in splits.items():
        for one, other in ((train, column), (column, train)):
            if one.numbers and other.listed and list(other.values) != [str(n) for n in range(len(other.values))]:
                numbers, named = (first, split) if one is train else (split, first)
                raise LabelError(
                    f"has numbers without names in the split {numbers!r} and the class names "
                    f"{first_few(other.values)} in the split {named!r}; the same names are required in all splits"
                )
        texts = [str(value) for value in column.values]
        table = positions(texts, names)
        unknown = [texts[number] for number in np.unique(column.rows).tolist() if table[number] < 0]
        if unknown:
            raise LabelError(
                f"has labels in the split {split!r} that the split {first!r} does not have: {first_few(unknown)}; the "
                f"labels of {first!r} are {first_few(names)}{almost(unknown[0], names)}"
            )
        labels.append(table[column.rows])
    return names, not train.numbers, labels


def first_few(values: Sequence[object]) -> str:
    """Join values with commas; list the first ones and count the rest."""
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(str(value) for value in values[:_SHOWN]) + more


def _column(values: Sequence[object], rows: Labels, exact: int) -> LabelColumn:
    """Sort distinct values, and join those that mean the same label; `rows` has -1 for missing values."""
    plain = [_plain(value, exact) for value in values]
    distinct = sorted({label for label in plain if label is not None})
    place = {label: number for number, label in enumerate(distinct)}
    # The last entry is that of the row number -1.
    table = np.array([-1 if label is None else place[label] for label in plain] + [-1], np.int64)
    missing = [repr(value) for value, label in zip(values, plain, strict=True) if label is None]
    return LabelColumn(tuple(distinct), table[rows], unlabelled=missing[0] if missing else "None")  # type: ignore[arg-type]


def _plain(value: object, exact: int) -> int | str | None:
    """Return a label as int or str, and None for a missing one."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise LabelError(f"has bytes that are no UTF-8 text: {value[:20]!r}") from None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, bool | int):
        return int(value) if value >= 0 else None
    if isinstance(value, float | Decimal):
        if value != value:
            return None
        if value in (float("inf"), float("-inf")) or value != int(value):
            raise LabelError(f"has values that are not whole numbers, such as {value}; {ALLOWED}")
        if isinstance(value, float) and abs(value) > exact:
            raise LabelError(f"has floats that are too large to be exact, such as {value}; {ALLOWED}")
        return int(value) if value >= 0 else None
    raise LabelError(f"has values that are no labels, such as {value!r}; {ALLOWED}")


def _from_one_hot(rows: NDArray[np.generic]) -> Labels:
    """Return the position of the 1 in each row of an ``(N, C)`` array."""
    if rows.dtype.kind not in "biuf":
        raise LabelError(f"has {rows.shape[1]} values of type {rows.dtype} for each image; {ALLOWED}")
    ones = rows == 1
    wrong = np.flatnonzero((ones.sum(1) != 1) | ((rows != 0) & ~ones).any(1))
    if wrong.size:
        row = int(wrong[0])
        values = first_few(rows[row].tolist())
        raise LabelError(f"has rows that are not one-hot (a single 1 and otherwise 0), such as row {row}: {values}")
    places: Labels = ones.argmax(1).astype(np.int64)
    return places


def _is_scalar(pa: ModuleType, kind: object) -> bool:
    types = pa.types
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    numbers = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    return any(check(kind) for check in (*texts, *numbers))
