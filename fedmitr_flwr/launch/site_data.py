"""``fedmitr split``: a source divided among sites as a simulation divides it, each part in a file of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedmitr_flwr.settings import Settings, SettingsError

FILE = "images.npz"


def write_parts(settings: Settings, clients: int, directory: Path) -> list[tuple[Path, int, int]]:
    """Write each client's training images as an archive that ``data-path`` can name.

    Parameters
    ----------
    settings
        `data` and `partition` are used.
    clients
        Number of parts K.
    directory
        Gets folders ``site-0`` to ``site-(K-1)``.

    Returns
    -------
    list
        For each part its file, number of images and number of classes in it.

    Raises
    ------
    SettingsError
        If the source or its division is impossible, a file is there already, or the disk refuses.
    """
    # PyTorch takes seconds to import, and most commands do without it.
    from fedmitr_flwr.data import load_source, partition_indices

    paths = [directory / f"site-{client}" / FILE for client in range(clients)]
    for path in paths:
        if path.exists():
            raise SettingsError(("file", str(path), "is there already and is never overwritten; move it away first"))
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
            raise SettingsError(("DIR", str(directory), f"can't be written: {error.strerror or error}")) from None
        told.append((path, len(images), int(np.count_nonzero(images.histogram(source.spec.num_classes)))))
    return told
