"""Choose the classes of a source that a run uses, and translate labels between class lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmitr_flwr.data.images import Labels
from fedmitr_flwr.data.sources.names import alike, almost, name_key, positions, same_name, spelt
from fedmitr_flwr.data.sources.raw import Header, Origin
from fedmitr_flwr.settings import DataSettings, SettingsError


def given_names(settings: DataSettings) -> tuple[str, ...]:
    """Parse `data.class-names`; an empty setting gives an empty tuple.

    Raises
    ------
    SettingsError
        If a name occurs twice, if two names look alike, or if there is only one name.
    """
    names = tuple(same_name(name) for name in settings.class_names.split(",") if name.strip())
    pair = alike(names)
    if pair or len(names) == 1:
        hint = f"; {spelt(pair[0])} and {spelt(pair[1])} look alike" if pair else ""
        allowed = f"must be at least two different names, separated by commas{hint}"
        raise SettingsError(("data.class-names", settings.class_names, allowed))
    return names


def choose_classes(settings: DataSettings, header: Header) -> tuple[tuple[str, ...], Labels]:
    """Return the first `data.classes` classes of the source, in the order of `data.class-names`.

    If the source has class names, the given names are matched to them and may be in any order. Renaming by position
    could exchange classes without an error. If the source has only label numbers, as MNIST does, they get the given
    names in order. Names are compared as in `match_classes`.

    Returns
    -------
    names
        The C class names of the run.
    new_label
        ``(classes of the source,)`` int64: label in the run, -1 for classes that the run does not use.

    Raises
    ------
    SettingsError
        If the source has fewer than two classes or two classes whose names look alike, or if `data.classes` or
        `data.class-names` does not fit its classes.
    """
    have = tuple(map(same_name, header.class_names)) if header.named else header.class_names
    if len(have) < 2:
        raise header.origin.error(f"has only one class ({', '.join(have)}); a run needs at least two")
    pair = alike(header.class_names)
    if pair:
        what = f"of the same name: {spelt(pair[0])}" if pair[0] == pair[1] else _look_alike(pair)
        raise header.origin.error(f"has two classes {what}")
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
    unknown = [name for name, place in zip(names, positions(names, have[:count]), strict=True) if place < 0]
    if unknown:
        allowed = f"must be the classes of {header.origin.value} in any order; {spelt(unknown[0])} is not one of "
        allowed += listed(have[:count]) + almost(unknown[0], have[:count])
        raise SettingsError(("data.class-names", settings.class_names, allowed))
    new_label[:count] = positions(have[:count], names)
    return names, new_label


def match_classes(labels: Labels, header: Header, class_names: tuple[str, ...]) -> Labels:
    """Translate a site's labels to those of the federation, by name if the site's classes have names.

    Two names are the same class if they are the same in Unicode's composed form (NFC), without blanks at their ends and
    without characters that no font shows. Upper and lower case differ. Label numbers without names are matched by name
    if the federation's classes are numbers too. Otherwise they are positions in its classes.

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
        If the site has images of a class that the federation does not have, or of two classes whose names look alike.
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
    new_label = positions(header.class_names, class_names)
    unknown = [header.class_names[label] for label in used if new_label[label] < 0]
    if unknown:
        odd = next((f" ({spelt(name)})" for name in unknown if not name.isascii() or name != same_name(name)), "")
        raise origin.error(
            f"has images of classes that the federation does not have: {listed(tuple(unknown))}{odd}; "
            f"its classes are {listed(class_names)}{almost(unknown[0], class_names)}"
        )
    pair = alike(header.class_names[label] for label in used)
    if pair:
        raise origin.error(f"has two classes {_look_alike(pair)}")
    return new_label[labels]


def same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two lists have the same classes in the same order, compared as in `match_classes`."""
    return [name_key(name) for name in names] == [name_key(name) for name in others]


def _look_alike(pair: tuple[str, str]) -> str:
    return f"whose names look alike: {spelt(pair[0])} and {spelt(pair[1])}"


def listed(names: Sequence[str], most: int = 20) -> str:
    """Join names with commas; above `most` names, list the first ones and count the rest."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
