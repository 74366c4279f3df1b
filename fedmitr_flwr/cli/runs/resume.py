"""The command ``fedmitr resume``: resume a simulation that failed or was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import AppOption, SetOption, bad_input
from fedmitr_flwr.cli.runs.simulate import run_and_exit
from fedmitr_flwr.launch import settings_files
from fedmitr_flwr.runs.resume import is_complete
from fedmitr_flwr.settings.home import expand


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run, such as outputs/demo.")],
    overrides: SetOption = None,
    cpus: Annotated[
        int | None, typer.Option("--cpus", help="CPU cores for the clients. Default: as in the first run.")
    ] = None,
    app_dir: AppOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all output of Flower and Ray.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Print plain lines instead of the live view.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the log only if the run fails.")] = False,
) -> None:
    """Resume a simulation that failed or was interrupted.

    Only clients without an upload train again. Finished inversion batches and distillation steps are kept. A setting on
    which finished work depends cannot be changed. The last line printed is the absolute path of the run's results.

    Exit code: 0 completed, 1 failed, 2 invalid input, 130 interrupted.
    """
    with bad_input():
        path = expand(run, "RUN").resolve()
        directory = settings_files.app_directory(app_dir)
        if is_complete(path):
            typer.echo(path)
            raise typer.Exit
        settings, federation = settings_files.resumed_run(path, overrides or [])
        config = settings_files.federation_config(None, None, cpus, federation)
    run_and_exit(directory, settings, config, live=not (plain or verbose or quiet), verbose=verbose, quiet=quiet)
