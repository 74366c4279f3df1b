"""``fedmitr resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import AppOption, SetOption, bad_input
from fedmitr_flwr.cli.runs.simulate import run_and_exit
from fedmitr_flwr.launch import settings_files
from fedmitr_flwr.runs.resume import is_complete


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run, such as outputs/demo.")],
    overrides: SetOption = None,
    cpus: Annotated[int | None, typer.Option("--cpus", help="CPU cores for the clients. Default: as before.")] = None,
    app_dir: AppOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all that Flower and Ray print.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="No live view: plain lines, as when piped.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the log only when the run fails.")] = False,
) -> None:
    """Go on with a simulation that failed or was interrupted, from what it has finished.

    Only clients whose upload is missing train again; finished inversion batches and distillation steps stay. A setting
    that decided what is finished cannot be changed. The last line printed is the absolute path of the run's results.

    Exit code: 0 completed, 1 failed, 2 bad input, 130 interrupted.
    """
    path = run.expanduser().resolve()
    with bad_input():
        directory = settings_files.app_directory(app_dir)
        if is_complete(path):
            typer.echo(path)
            raise typer.Exit
        settings, federation = settings_files.resumed_run(path, overrides or [])
        config = settings_files.federation_config(None, None, cpus, federation)
    run_and_exit(directory, settings, config, live=not (plain or verbose or quiet), verbose=verbose, quiet=quiet)
