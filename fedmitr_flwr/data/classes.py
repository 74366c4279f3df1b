"""Choose the classes of a source that a run uses, and translate labels between class lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmitr_flwr.data.images import Labels
from fedmitr_flwr.data.sources.raw import Header, Origin
from fedmitr_flwr.settings import DataSettings, SettingsError


def given_names(settings: DataSettings) -> tuple[str, ...]:
    """Parse `data.class-names`; an empty setting gives an empty tuple.

    Raises
    ------
    SettingsError
        If a name occurs twice, or if there is only one name.
    """
    names = tuple(name.strip() for name in settings.class_names.split(",") if name.strip())
    if len(set(names)) != len(names) or len(names) == 1:
        allowed = "must be at least two different names, separated by commas"
        raise SettingsError(("data.class-names", settings.class_names, allowed))
    return names


def choose_classes(settings: DataSettings, header: Header) -> tuple[tuple[str, ...], Labels]:
    """Return the first `data.classes` classes of the source, in the order of `data.class-names`.

    If the source has class names, the given names are matched to them and may be in any order. Renaming by position
    could exchange classes without an error. If the source has only label numbers, as MNIST does, they get the given
    names in order.

    Returns
    -------
    names
        The C class names of the run.
    new_label
        ``(classes of the source,)`` int64: label in the run, -1 for classes that the run does not use.

    Raises
    ------
    SettingsError
        If the source has fewer than two classes or two classes of the same name, or if `data.classes` or
        `data.class-names` does not fit its classes.
    """
    have = header.class_names
    if len(have) < 2:
        raise header.origin.error(f"has only one class ({', '.join(have)}); a run needs at least two")
    if len(set(have)) != len(have):
        raise header.origin.error(f"has two classes of the same name: {', '.join(sorted(have))}")
    count = settings.classes or len(have)
    if count > len(have) or count < 2:
        allowed = f"must be 0 (all classes) or from 2 to {len(have)}, the number of classes of {settings.source}"
        raise SettingsError(("data.classes", settings.classes, allowed))
    names = given_names(settings) or have[:count]
    if len(names) != count:
        allowed = f"must name {count} classes, but names {len(names)}; data.classes sets their number"
        raise SettingsError(("data.class-names", settings.class_names, allowed))
    new_label = np.full(len(have), -1, np.int64)
    if not header.named:
        new_label[:count] = np.arange(count)
        return names, new_label
    unknown = [name for name in names if name not in have[:count]]
    if unknown:
        allowed = f"must be the classes of {header.origin.value} in any order; {unknown[0]!r} is not one of "
        raise SettingsError(("data.class-names", settings.class_names, allowed + listed(have[:count])))
    for label, name in enumerate(have[:count]):
        new_label[label] = names.index(name)
    return names, new_label


def match_classes(labels: Labels, header: Header, class_names: tuple[str, ...]) -> Labels:
    """Translate a site's labels to those of the federation, by name if the site's classes have names.

    Label numbers without names are matched by name if the federation's classes are numbers too. Otherwise they are
    positions in its classes.

    Parameters
    ----------
    labels
        ``(N,)`` int64, positions in the header's class names.
    header
        Class names of the site.
    class_names
        Class names of the federation.

    Returns
    -------
    ndarray
        ``(N,)`` int64, positions in `class_names`.

    Raises
    ------
    SettingsError
        If the site has images of a class that the federation does not have.
    """
    used = np.unique(labels).tolist()
    origin: Origin = header.origin
    # Numbers are positions in the federation's classes, unless these are numbers too, such as 1, 2 and 3.
    if not header.named and not any(name.isdecimal() for name in class_names):
        numbers = [int(name) for name in header.class_names]
        highest = numbers[used[-1]] if used else -1
        if highest >= len(class_names):
            raise origin.error(f"has images with label {highest}, but the federation has {len(class_names)} classes")
        return np.array([min(number, len(class_names)) for number in numbers] or [0], np.int64)[labels]
    unknown = [header.class_names[label] for label in used if header.class_names[label] not in class_names]
    if unknown:
        raise origin.error(
            f"has images of classes that the federation does not have: {listed(tuple(unknown))}; "
            f"its classes are {listed(class_names)}"
        )
    new_label = np.array([class_names.index(n) if n in class_names else -1 for n in header.class_names], np.int64)
    return new_label[labels]


def listed(names: Sequence[str], most: int = 20) -> str:
    """Join names with commas; above `most` names, list the first ones and count the rest."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
