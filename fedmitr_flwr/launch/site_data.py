"""``fedmitr split``: divide a data source among sites in the same way as a simulation, one file for each site."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedmitr_flwr.settings import Settings, SettingsError

FILE = "images.npz"


def write_parts(settings: Settings, clients: int, directory: Path) -> list[tuple[Path, int, int]]:
    """Write the training images of each client as an archive for the node config's ``data-path``.

    Parameters
    ----------
    settings
        The groups `data` and `partition` are used.
    clients
        Number of parts K.
    directory
        Folder in which ``site-0`` to ``site-(K-1)`` are created.

    Returns
    -------
    list
        For each part its file, its number of images and its number of classes.

    Raises
    ------
    SettingsError
        If the source cannot be loaded or divided, a file exists already, or a file cannot be written.
    """
    # Imported here because PyTorch takes seconds to import, and most commands do not need it.
    from fedmitr_flwr.data import load_source, partition_indices

    paths = [directory / f"site-{client}" / FILE for client in range(clients)]
    for path in paths:
        if path.exists():
            raise SettingsError(("file", str(path), "exists already and is never overwritten; move it away first"))
    source = load_source(settings.data)
    parts = partition_indices(source.train, settings.partition, clients)
    told = []
    for path, part in zip(paths, parts, strict=True):
        images = source.train.subset(part)
        # (N, ch, S, S) to (N, S, S) or (N, S, S, ch), as npz.py reads them.
        pixels = images.images(np.arange(len(images))).permute(0, 2, 3, 1).numpy()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(
                path,
                images=pixels[..., 0] if source.spec.channels == 1 else pixels,
                label=images.labels,
                class_names=np.array(source.spec.class_names),
            )
        except OSError as error:
            raise SettingsError(("DIR", str(directory), f"cannot be written: {error.strerror or error}")) from None
        told.append((path, len(images), int(np.count_nonzero(images.histogram(source.spec.num_classes)))))
    return told
