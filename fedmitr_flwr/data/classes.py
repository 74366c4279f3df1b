"""Which classes of a source a run uses, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmitr_flwr.data.images import Labels
from fedmitr_flwr.data.sources.raw import Header, Origin
from fedmitr_flwr.settings import DataSettings, SettingsError


def given_names(settings: DataSettings) -> tuple[str, ...]:
    """Parse `data.class-names`; empty when it is not set.

    Raises
    ------
    SettingsError
        If a name occurs twice or there is only one.
    """
    names = tuple(name.strip() for name in settings.class_names.split(",") if name.strip())
    if len(set(names)) != len(names) or len(names) == 1:
        allowed = "must be two names or more, separated by commas, each different"
        raise SettingsError(("data.class-names", settings.class_names, allowed))
    return names


def choose_classes(settings: DataSettings, header: Header) -> tuple[tuple[str, ...], Labels]:
    """Take the first `data.classes` of the source and bring them in the order of `data.class-names`.

    Names that come with the data are matched, in any order: to rename by position would mix up
    classes without a word. Mere numbers (MNIST's) get the given names in order.

    Returns
    -------
    names
        The C class names of the run.
    new_label
        ``(classes of the source,)`` int64: label in the run, -1 for classes left out.
    """
    have = header.class_names
    if len(have) < 2:
        raise header.origin.error(f"has one class only ({', '.join(have)}); at least two are needed")
    if len(set(have)) != len(have):
        raise header.origin.error(f"has two classes of the same name: {', '.join(sorted(have))}")
    count = settings.classes or len(have)
    if count > len(have) or count < 2:
        allowed = f"must lie between 2 and the number of classes of {settings.source}, {len(have)}; 0: all of them"
        raise SettingsError(("data.classes", settings.classes, allowed))
    names = given_names(settings) or have[:count]
    if len(names) != count:
        allowed = f"must name {count} classes, names {len(names)}; data.classes limits their number"
        raise SettingsError(("data.class-names", settings.class_names, allowed))
    new_label = np.full(len(have), -1, np.int64)
    if not header.named:
        new_label[:count] = np.arange(count)
        return names, new_label
    unknown = [name for name in names if name not in have[:count]]
    if unknown:
        allowed = f"must be the classes of {header.origin.value} in any order; {unknown[0]!r} is not among "
        raise SettingsError(("data.class-names", settings.class_names, allowed + listed(have[:count])))
    for label, name in enumerate(have[:count]):
        new_label[label] = names.index(name)
    return names, new_label


def match_classes(labels: Labels, header: Header, class_names: tuple[str, ...]) -> Labels:
    """Translate a site's own labels to the federation's, by name where the site's classes have names.

    Parameters
    ----------
    labels
        ``(N,)`` int64, position in the header's class names.
    header
        The site's classes.
    class_names
        The federation's.

    Returns
    -------
    ndarray
        ``(N,)`` int64, position in `class_names`.

    Raises
    ------
    SettingsError
        If the site has images of a class that the federation does not know.
    """
    used = np.unique(labels).tolist()
    origin: Origin = header.origin
    if not header.named:
        if used and used[-1] >= len(class_names):
            raise origin.error(f"has images with label {used[-1]}, but the federation has {len(class_names)} classes")
        return labels
    unknown = [header.class_names[label] for label in used if header.class_names[label] not in class_names]
    if unknown:
        raise origin.error(
            f"has images of classes that the federation does not know: {listed(tuple(unknown))}; "
            f"it knows {listed(class_names)}"
        )
    new_label = np.array([class_names.index(n) if n in class_names else -1 for n in header.class_names], np.int64)
    return new_label[labels]


def listed(names: Sequence[str], most: int = 20) -> str:
    """Join names for a sentence; of more than `most` the first ones and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
