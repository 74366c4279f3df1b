"""A client's own training images: its part of the simulated federation, or the data of its site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.data.classes import match_classes
from fedmitr_flwr.data.images import ImageSet
from fedmitr_flwr.data.load import Source, known_geometry, load_source, load_spec, resolve_geometry, split_origin
from fedmitr_flwr.data.partition import partition_indices
from fedmitr_flwr.data.presets import Geometry
from fedmitr_flwr.data.sources.folder import load_folder
from fedmitr_flwr.data.sources.npz import load_npz
from fedmitr_flwr.data.sources.raw import TRAIN, Origin, RawSource
from fedmitr_flwr.data.spec import ImageSpec
from fedmitr_flwr.settings import DataSettings, PartitionSettings, Settings, SettingsError

NodeConfig = Mapping[str, bool | int | float | str]


def client_images(
    settings: Settings,
    node_config: NodeConfig,
    class_names: tuple[str, ...] | None,
    *,
    spec: ImageSpec | None = None,
) -> tuple[ImageSet, ImageSpec]:
    """Return what this client trains on: never an image of the test or validation set.

    Parameters
    ----------
    settings
        The run's settings.
    node_config
        Flower's node config. With ``data-path`` (a folder or ``.npz`` file of this site) that is the
        data and everything in it is for training, less what it marks as test data itself (a
        ``test`` folder or array). Otherwise ``partition-id`` and ``num-partitions`` say which part of
        `data.source` is this client's.
    class_names
        The federation's classes as the server knows them; None: as this client finds them.
    spec
        The server's spec; None: worked out here. A site's images are brought to it.

    Returns
    -------
    images
        Possibly empty; possibly of one class only.
    spec
        Classes, size and normalisation to train with.

    Raises
    ------
    SettingsError
        If the data is not there, has classes that the federation does not know, or differs from the server's.
    """
    names = spec.class_names if spec else class_names
    path = node_config.get("data-path")
    if path:
        return _site(settings.data, Origin("data-path", str(path)), names, spec)
    source = _source(settings.data)
    _check_same(source.spec, spec or replace(source.spec, class_names=names or source.spec.class_names), settings)
    client, clients = _place(node_config)
    part = _partition(settings.data, settings.partition, clients)[client]
    return source.train.subset(part), source.spec


def site_images(settings: DataSettings, origin: Origin, spec: ImageSpec) -> ImageSet:
    """Return what a folder or ``.npz`` file holds, less what it marks as test data itself, brought to a spec.

    Raises
    ------
    SettingsError
        As `client_images`, naming the key of `origin`.
    """
    return _site(settings, origin, spec.class_names, spec)[0]


# Ray actors serve many clients one after another: they load and divide once.
@lru_cache(maxsize=1)
def _source(settings: DataSettings) -> Source:
    return load_source(settings)


@lru_cache(maxsize=1)
def _partition(data: DataSettings, partition: PartitionSettings, clients: int) -> list[NDArray[np.int64]]:
    return partition_indices(_source(data).train, partition, clients)


def _place(node_config: NodeConfig) -> tuple[int, int]:
    client, clients = node_config.get("partition-id"), node_config.get("num-partitions")
    if not isinstance(client, int) or not isinstance(clients, int) or not 0 <= client < clients:
        allowed = "the node config needs data-path, or integers partition-id and num-partitions with the first below"
        raise SettingsError(("partition-id", client, f"{allowed} the second (num-partitions = {clients})"))
    return client, clients


def _site(
    settings: DataSettings, origin: Origin, names: tuple[str, ...] | None, spec: ImageSpec | None
) -> tuple[ImageSet, ImageSpec]:
    kind, path = split_origin(origin)
    if kind == "hub" or not path.exists():
        raise origin.error(f"there is no folder or .npz file {path} on this site; set data-path in its node config")
    raw = load_npz(path, origin) if kind == "npz" else load_folder(path, origin, train_only=True)
    spec = spec or _site_spec(settings, raw, names or load_spec(settings).class_names)
    rows = np.flatnonzero(raw.split == TRAIN)
    _check_channels(raw.header.geometry, spec, origin)
    images = ImageSet(
        labels=match_classes(raw.labels[rows], raw.header, spec.class_names),
        reader=raw.reader,
        rows=rows,
        channels=spec.channels,
        image_size=spec.image_size,
        columns={name: column[rows] for name, column in raw.columns.items()},
    )
    return images, spec


def _site_spec(settings: DataSettings, raw: RawSource, names: tuple[str, ...]) -> ImageSpec:
    """Work out the spec without the server's files: from the kind of its source, else from the site's own data."""
    return ImageSpec(names, *resolve_geometry(settings, known_geometry(settings) or raw.header.geometry))


def _check_channels(geometry: Geometry, spec: ImageSpec, origin: Origin) -> None:
    if geometry.channels != spec.channels and {geometry.channels, spec.channels} != {1, 3}:
        raise origin.error(f"has images of {geometry.channels} channels, the federation works with {spec.channels}")


def _check_same(here: ImageSpec, there: ImageSpec, settings: Settings) -> None:
    for name in (item.name for item in fields(ImageSpec)):
        mine, other = getattr(here, name), getattr(there, name)
        if mine != other:
            allowed = f"is not the same here as at the server: {name} is {mine} here and {other} there"
            raise SettingsError(("data.source", settings.data.source, allowed))
