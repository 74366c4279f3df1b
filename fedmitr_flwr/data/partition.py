"""Divide the training images among simulated clients with the partitioners of flwr-datasets."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.data.classes import listed
from fedmitr_flwr.data.images import ImageSet
from fedmitr_flwr.settings import PartitionSettings, SettingsError

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

CLIENTS = "num-supernodes"


def partition_indices(train: ImageSet, settings: PartitionSettings, num_partitions: int) -> list[NDArray[np.int64]]:
    """Divide the training images among clients.

    Parameters
    ----------
    train
        The training set; only its labels and columns are used.
    settings
        `kind` and its parameters; the same `seed` gives the same partition.
    num_partitions
        Number of clients K.

    Returns
    -------
    list
        K disjoint arrays of ascending positions in `train` that together cover it. With `dirichlet` clients may be
        empty unless `min_size` is above 0. `pathological` covers every class only if there are at least as many
        clients as classes; images of the other classes are not used.

    Raises
    ------
    SettingsError
        If the images cannot be divided in this way among `num_partitions` clients.

    Notes
    -----
    Dirichlet: the clients' shares of each class are drawn from Dir(alpha) (Yurochkin et al., ICML 2019), without
    balancing. Pathological: client k has class k mod C and further classes at random (after McMahan et al., AISTATS
    2017).
    """
    if not 1 <= num_partitions <= len(train):
        allowed = f"must be from 1 to the number of training images, {len(train)}"
        raise SettingsError((CLIENTS, num_partitions, allowed))
    _check(train, settings, num_partitions)
    partitioner = _partitioner(settings, num_partitions)
    partitioner.dataset = _table(train, settings)
    # One partitioner prints a progress bar, others warn about errors that `_check` has excluded.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            parts = [partitioner.load_partition(k).with_format("numpy")["row"][:] for k in range(num_partitions)]
        except ValueError as error:
            raise _refused(error, settings, num_partitions) from None
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def _partitioner(settings: PartitionSettings, num_partitions: int) -> Partitioner:
    from flwr_datasets import partitioner

    if settings.kind == "dirichlet":
        return partitioner.DirichletPartitioner(
            num_partitions=num_partitions,
            partition_by="label",
            alpha=settings.alpha,
            min_partition_size=settings.min_size,
            self_balancing=False,
            seed=settings.seed,
        )
    if settings.kind == "pathological":
        return partitioner.PathologicalPartitioner(
            num_partitions=num_partitions,
            partition_by="label",
            num_classes_per_partition=settings.classes_per_client,
            class_assignment_mode="first-deterministic",
            seed=settings.seed,
        )
    if settings.kind == "natural":
        return partitioner.NaturalIdPartitioner(partition_by=settings.column)
    return partitioner.IidPartitioner(num_partitions=num_partitions)


def _table(train: ImageSet, settings: PartitionSettings) -> Dataset:
    """Return a table of row numbers and of the columns to divide by, without the images."""
    import datasets

    rows = np.arange(len(train))
    if settings.kind == "iid":
        # The IID partitioner takes consecutive rows, and the images of a source are often sorted by class.
        rows = np.random.default_rng(settings.seed).permutation(rows)
    columns: dict[str, object] = {"row": rows, "label": train.labels[rows]}
    if settings.kind == "natural":
        columns[settings.column] = _column(train, settings)[rows]
    return datasets.Dataset.from_dict(columns)


def _column(train: ImageSet, settings: PartitionSettings) -> NDArray[np.generic]:
    return train.labels if settings.column == "label" else train.columns[settings.column]


def _check(train: ImageSet, settings: PartitionSettings, num_partitions: int) -> None:
    if settings.kind == "dirichlet" and settings.min_size * num_partitions > len(train):
        allowed = f"cannot be met by {num_partitions} clients with {len(train)} training images"
        raise SettingsError(("partition.min-size", settings.min_size, allowed))
    if settings.kind == "pathological":
        there = len(np.unique(train.labels))
        if settings.classes_per_client > there:
            allowed = f"must be at most the number of classes, {there}"
            raise SettingsError(("partition.classes-per-client", settings.classes_per_client, allowed))
    if settings.kind == "natural":
        if settings.column not in ("label", *train.columns):
            has = ", ".join(sorted(train.columns)) or "none"
            allowed = f'must be a column of the source for partition.kind = "natural"; its columns are: {has}'
            raise SettingsError(("partition.column", settings.column, allowed))
        values = tuple(str(value) for value in np.unique(_column(train, settings)))
        if len(values) != num_partitions:
            allowed = (
                f"needs one client for each value of partition.column = {settings.column!r}: "
                f"there are {len(values)} values ({listed(values)}) and {num_partitions} clients ({CLIENTS})"
            )
            raise SettingsError(("partition.kind", "natural", allowed))


def _refused(error: ValueError, settings: PartitionSettings, num_partitions: int) -> SettingsError:
    if settings.kind == "dirichlet":
        allowed = (
            f"was not met in ten draws with {num_partitions} clients and partition.alpha = {settings.alpha}; "
            "lower it, raise partition.alpha or use fewer clients"
        )
        return SettingsError(("partition.min-size", settings.min_size, allowed))
    allowed = f"does not work with {num_partitions} clients: {error}"
    return SettingsError(("partition.classes-per-client", settings.classes_per_client, allowed))
