"""``fedmitr split``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import AppOption, ConfArgument, SetOption, bad_input
from fedmitr_flwr.launch import settings_files
from fedmitr_flwr.launch.site_data import write_parts


def split(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the sites' folders go; made if missing.")],
    conf: ConfArgument = None,
    overrides: SetOption = None,
    clients: Annotated[int, typer.Option("--clients", "-n", min=1, help="Number of sites.")] = 3,
    app_dir: AppOption = None,
) -> None:
    """Divide data.source among sites, to try a deployment with data that a simulation has too.

    Each gets a folder DIR/site-K with images.npz, for its node config's data-path: the training images of
    partition K under the same settings and seed. Test and validation images stay out. Nothing is overwritten.
    Prints for each file its number of images and of classes. Exit code: 0 done, 2 bad input.
    """
    with bad_input():
        settings = settings_files.run_settings(settings_files.app_directory(app_dir), conf, overrides or [])
        for path, images, classes in write_parts(settings, clients, directory):
            typer.echo(f"{path}: {images} images of {classes} classes")
