"""Load the training images of a client: its partition in a simulation, or the data of its site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.data.classes import match_classes, same_classes
from fedmitr_flwr.data.images import ImageSet, Labels
from fedmitr_flwr.data.load import (
    Source,
    known_geometry,
    load_source,
    load_spec,
    log_images,
    resolve_geometry,
    split_origin,
)
from fedmitr_flwr.data.partition import partition_indices
from fedmitr_flwr.data.presets import Geometry
from fedmitr_flwr.data.sources.files import exists
from fedmitr_flwr.data.sources.folder import HeldOut, load_folder
from fedmitr_flwr.data.sources.npz import load_npz
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, Header, Origin, RawSource
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
    """Return the training images of this client, without any image of the test or validation set.

    Parameters
    ----------
    settings
        Settings of the run.
    node_config
        Flower's node config. If it has ``data-path``, a folder or ``.npz`` file of this site, all images there are
        training images, except those that the folder or file itself marks as test data (a ``test`` folder or array).
        Otherwise ``partition-id`` and ``num-partitions`` name the part of `data.source` that belongs to this client.
    class_names
        Class names of the federation as the server has them. None: those that this client finds.
    spec
        The server's spec, to which a site's images are converted. None: it is derived here.

    Returns
    -------
    images
        May be empty, and may have images of one class only.
    spec
        Classes, size and normalisation for training.

    Raises
    ------
    SettingsError
        If the data is missing, has classes that the federation does not have, or differs from the server's.
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
    """Return the images of a folder or ``.npz`` file to evaluate a model on, converted to a spec.

    Of a file that marks test data, these are its test data; of another file, all images.

    Raises
    ------
    SettingsError
        As for `client_images`, and if a folder has several splits; the message names the key of `origin`.
    """
    return _site(settings, origin, spec.class_names, spec, held_out="refuse")[0]


# A Ray actor trains many clients one after another. It loads and divides the source only once.
@lru_cache(maxsize=1)
def _source(settings: DataSettings) -> Source:
    return load_source(settings)


@lru_cache(maxsize=1)
def _partition(data: DataSettings, partition: PartitionSettings, clients: int) -> list[NDArray[np.int64]]:
    return partition_indices(_source(data).train, partition, clients)


def _place(node_config: NodeConfig) -> tuple[int, int]:
    client, clients = node_config.get("partition-id"), node_config.get("num-partitions")
    if not isinstance(client, int) or not isinstance(clients, int) or not 0 <= client < clients:
        allowed = (
            "the node config needs data-path, or integers partition-id and num-partitions, where partition-id is from 0"
        )
        raise SettingsError(("partition-id", client, f"{allowed} to num-partitions - 1 (num-partitions = {clients})"))
    return client, clients


def _site(
    settings: DataSettings,
    origin: Origin,
    names: tuple[str, ...] | None,
    spec: ImageSpec | None,
    *,
    held_out: HeldOut = "ignore",
) -> tuple[ImageSet, ImageSpec]:
    kind, path = split_origin(origin)
    if kind == "hub" or not exists(path, origin):
        raise origin.error(f"no folder or .npz file {path} exists on this site; set data-path in its node config")
    class_names = names or load_spec(settings).class_names

    def accept(header: Header, labels: Labels) -> None:
        match_classes(labels, header, class_names)

    if kind == "npz":
        raw = load_npz(path, origin)
    else:
        raw = load_folder(path, origin, held_out=held_out, known=class_names, accept=accept)
    spec = spec or _site_spec(settings, raw, class_names)
    evaluated = held_out == "refuse"
    rows = np.flatnonzero(raw.split == (TEST if evaluated and TEST in raw.split else TRAIN))
    _check_channels(raw.header.geometry, spec, origin)
    images = ImageSet(
        labels=match_classes(raw.labels[rows], raw.header, spec.class_names),
        reader=raw.reader,
        rows=rows,
        channels=spec.channels,
        image_size=spec.image_size,
        columns={name: column[rows] for name, column in raw.columns.items()},
    )
    others = len(raw.labels) - len(rows)
    phrase = f"{others} images that it {'does not mark' if evaluated else 'marks'} as test data"
    left_out = (*raw.left_out, *([phrase] if others else []))
    log_images(origin, spec, {"to evaluate" if evaluated else "training": images}, left_out)
    return images, spec


def _site_spec(settings: DataSettings, raw: RawSource, names: tuple[str, ...]) -> ImageSpec:
    """Derive the spec without the server's files, from the source's known geometry or else from the site's data."""
    return ImageSpec(names, *resolve_geometry(settings, known_geometry(settings) or raw.header.geometry))


def _check_channels(geometry: Geometry, spec: ImageSpec, origin: Origin) -> None:
    if geometry.channels != spec.channels and {geometry.channels, spec.channels} != {1, 3}:
        raise origin.error(f"has images of {geometry.channels} channels, but the federation uses {spec.channels}")


def _check_same(here: ImageSpec, there: ImageSpec, settings: Settings) -> None:
    for name in (item.name for item in fields(ImageSpec)):
        mine, other = getattr(here, name), getattr(there, name)
        if mine != other and not (name == "class_names" and same_classes(mine, other)):
            allowed = f"differs from the server's: {name} is {mine} here and {other} at the server"
            raise SettingsError(("data.source", settings.data.source, allowed))
