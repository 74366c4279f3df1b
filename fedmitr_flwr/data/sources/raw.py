"""A source as it was found, before the settings choose classes, sizes and splits."""

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
        As the user wrote them, for error messages.
    """

    key: str
    value: str

    def error(self, allowed: str) -> SettingsError:
        """Make the error that says what is wrong with this source."""
        return SettingsError((self.key, self.value, allowed))


@dataclass(frozen=True)
class Header:
    """What is known of a source without reading its images.

    Attributes
    ----------
    origin
        Who named it.
    class_names
        All its classes; the position is the raw label.
    named
        Whether these names come with the data, so that classes are matched by name; otherwise they are
        only the label numbers and may be given other names.
    geometry
        Its own size and normalisation.
    """

    origin: Origin
    class_names: tuple[str, ...]
    named: bool
    geometry: Geometry


@dataclass(frozen=True)
class RawSource:
    """All images of a source, over all its splits.

    Attributes
    ----------
    header
        Classes and geometry.
    reader
        The pixels; row i belongs to entry i below.
    labels
        ``(N,)`` int64, position in the header's class names.
    split
        ``(N,)`` int8: TRAIN, VALIDATION or TEST as the source says; all TRAIN when it doesn't.
    columns
        Further columns, each ``(N,)``.
    """

    header: Header
    reader: Reader
    labels: Labels
    split: NDArray[np.int8]
    columns: Mapping[str, Column] = field(default_factory=dict)
