"""The content of a source before the settings for classes, sizes and splits are applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.data.images import Column, Labels, Reader
from fedmitr_flwr.data.presets import Geometry
from fedmitr_flwr.settings import SettingsError

TRAIN, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class Origin:
    """The setting that named a source: `data.source`, or `data-path` of a site.

    Attributes
    ----------
    key, value
        Key and value as the user wrote them, for error messages.
    """

    key: str
    value: str

    def error(self, allowed: str) -> SettingsError:
        """Return an error about this source; `allowed` says what is wrong or what is allowed."""
        return SettingsError((self.key, self.value, allowed))


@dataclass(frozen=True)
class Header:
    """Properties of a source that are known without reading its images.

    Attributes
    ----------
    origin
        The setting that named the source.
    class_names
        Names of all classes of the source; the position of a name is the raw label.
    named
        Whether the names come with the data; classes are then matched by name. Otherwise the names are the label
        numbers in ascending order. If these are 0 to C-1, the settings may replace them.
    geometry
        Shape and normalisation of the source's images.
    declared
        Whether the data lists its classes. False: the classes are the different labels of its images.
    """

    origin: Origin
    class_names: tuple[str, ...]
    named: bool
    geometry: Geometry
    declared: bool = True


@dataclass(frozen=True)
class RawSource:
    """All images of a source, over all its splits.

    Attributes
    ----------
    header
        Classes and geometry.
    reader
        Reader of the pixels; its row i belongs to entry i of the arrays below.
    labels
        ``(N,)`` int64, positions in the header's class names.
    split
        ``(N,)`` int8: TRAIN, VALIDATION or TEST as given by the source; all TRAIN if it has no split.
    columns
        Further columns, each ``(N,)``.
    left_out
        What the source holds and a run does not use, each a phrase for the log, such as ``3 files that end in .gif``.
    """

    header: Header
    reader: Reader
    labels: Labels
    split: NDArray[np.int8]
    columns: Mapping[str, Column] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
