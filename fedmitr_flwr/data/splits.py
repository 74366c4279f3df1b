"""Complete the split of a source: make the missing test and validation sets from each class's training images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.data.images import Labels
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, VALIDATION
from fedmitr_flwr.settings import DataSettings


def complete_split(labels: Labels, given: NDArray[np.int8], settings: DataSettings) -> NDArray[np.int8]:
    """Hold out a test set and a validation set if the source has none.

    Parameters
    ----------
    labels
        ``(N,)`` int64.
    given
        ``(N,)`` int8, TRAIN, VALIDATION or TEST as given by the source.
    settings
        `test_fraction` of each class's training images becomes the test set, then `validation_fraction` of the rest
        becomes the validation set; `split_seed` is the seed.

    Returns
    -------
    ndarray
        ``(N,)`` int8; differs from `given` only for training images that are now VALIDATION or TEST.
    """
    split = given.copy()
    for part, fraction in ((TEST, settings.test_fraction), (VALIDATION, settings.validation_fraction)):
        if not (given == part).any():
            train = np.flatnonzero(split == TRAIN)
            split[train[held_out(labels[train], fraction, (settings.split_seed, part))]] = part
    return split


def held_out(labels: Labels, fraction: float, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Choose a fraction of the images of each class at random.

    In a class of two or more images, at least one is chosen and at least one is not. The only image of a class is not
    chosen. Each class has its own random generator, so its choice does not depend on the other classes.

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
