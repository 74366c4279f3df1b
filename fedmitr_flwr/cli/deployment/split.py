"""The command ``fedmitr split``: write one data file for each site, to try a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import AppOption, ConfArgument, SetOption, bad_input
from fedmitr_flwr.launch import settings_files
from fedmitr_flwr.launch.site_data import write_parts
from fedmitr_flwr.runs.log import console_log
from fedmitr_flwr.settings.home import expand


def split(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the sites' folders; made if missing.")],
    conf: ConfArgument = None,
    overrides: SetOption = None,
    clients: Annotated[int, typer.Option("--clients", "-n", min=1, help="Number of sites.")] = 3,
    app_dir: AppOption = None,
) -> None:
    """Write one data file for each site, to try a deployment.

    The source is the setting data.source. Site K gets DIR/site-K/images.npz with the training images that client K has
    in a simulation under the same settings and seed; name this file in the site's node config as data-path. Test and
    validation images are left out. Existing files are never overwritten. The command prints for each file its number
    of images and of classes, and on stderr what the source has and what of it is not used.

    Exit code: 0 written, 2 invalid input.
    """
    with bad_input():
        directory = expand(directory, "DIR")
        settings = settings_files.run_settings(settings_files.app_directory(app_dir), conf, overrides or [])
        with console_log():
            parts = write_parts(settings, clients, directory)
        for path, images, classes in parts:
            typer.echo(f"{path}: {images} images of {classes} classes")
