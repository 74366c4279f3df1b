"""``fedmitr split``: a source divided among sites as a simulation divides it, each part in a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fedmitr_flwr import run_files
from fedmitr_flwr.settings import Settings, SettingsError

FILE = "images.npz"


def split(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the sites' folders go; made if missing.")],
    conf: Annotated[
        Path | None,
        typer.Argument(show_default=False, help="Settings file. Without it: the app's defaults."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="One setting, wins over CONF; repeatable."),
    ] = None,
    clients: Annotated[int, typer.Option("--clients", "-n", min=1, help="Number of sites.")] = 3,
    app_dir: Annotated[
        Path | None,
        typer.Option("--app", metavar="DIR", help="Folder of the Flower app. Default: where this command comes from."),
    ] = None,
) -> None:
    """Divide data.source among sites, to try a deployment with data that a simulation has too.

    Each gets a folder DIR/site-K with images.npz, for its node config's data-path: the training images of
    partition K under the same settings and seed. Test and validation images stay out. Nothing is overwritten.
    Prints for each file its number of images and of classes. Exit code: 0 done, 2 bad input.
    """
    try:
        settings = run_files.run_settings(run_files.app_directory(app_dir), conf, overrides or [])
        for path, images, classes in write_parts(settings, clients, directory):
            typer.echo(f"{path}: {images} images of {classes} classes")
    except SettingsError as error:
        typer.secho("\n".join(f"fedmitr: {line}" for line in str(error).splitlines()), err=True, fg=typer.colors.RED)
        raise typer.Exit(2) from None


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
