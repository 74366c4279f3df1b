"""Train, validation and test split: what the source gives stays, what is missing is made, class by class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.data.images import Labels
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, VALIDATION
from fedmitr_flwr.settings import DataSettings


def complete_split(labels: Labels, given: NDArray[np.int8], settings: DataSettings) -> NDArray[np.int8]:
    """Hold out a test and a validation set where the source has none.

    Parameters
    ----------
    labels
        ``(N,)`` int64.
    given
        ``(N,)`` int8, TRAIN, VALIDATION or TEST as the source says.
    settings
        `test_fraction` of each class of the training split, then `validation_fraction` of each class
        of what is left; `split_seed`.

    Returns
    -------
    ndarray
        ``(N,)`` int8; differs from `given` only in training images that became VALIDATION or TEST.
    """
    split = given.copy()
    for part, fraction in ((TEST, settings.test_fraction), (VALIDATION, settings.validation_fraction)):
        if not (given == part).any():
            train = np.flatnonzero(split == TRAIN)
            split[train[held_out(labels[train], fraction, (settings.split_seed, part))]] = part
    return split


def held_out(labels: Labels, fraction: float, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Choose a fraction of each class at random.

    Of a class with two images or more at least one is chosen and at least one is left; a single
    image is left. Each class has a generator of its own, so that its choice does not depend on the others.

    Returns
    -------
    ndarray
        ``(M,)`` positions, ascending.
    """
    chosen = [np.zeros(0, np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) >= 2:
            count = min(max(round(fraction * len(members)), 1), len(members) - 1)
            chosen.append(np.random.default_rng([*seed, int(label)]).permutation(members)[:count])
    return np.sort(np.concatenate(chosen))
