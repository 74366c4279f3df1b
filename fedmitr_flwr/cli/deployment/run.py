"""The command ``fedmitr run``: start a run in a deployed federation and follow it to its end."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmitr_flwr.cli.common import FAILED, AppOption, ConfArgument, SetOption, bad_input, show_error
from fedmitr_flwr.launch import settings_files
from fedmitr_flwr.launch.deploy import Deployment


def run(
    superlink: Annotated[
        str, typer.Argument(metavar="SUPERLINK", help="Name of the SuperLink connection in Flower's config.toml.")
    ],
    conf: ConfArgument = None,
    overrides: SetOption = None,
    patience: Annotated[
        float, typer.Option("--patience", min=0.0, help="Seconds to wait for a SuperLink that does not answer.")
    ] = 600.0,
    app_dir: AppOption = None,
) -> None:
    """Start a run in a deployed federation and follow it to its end.

    A path in the settings is a path on the machine that uses it; `run.output`, for example, is a path on the server.
    Ctrl-C ends this command, but not the run.

    Exit code: 0 completed, 1 failed, 2 invalid input, 130 ended by Ctrl-C while the run continues.
    """
    with bad_input():
        directory = settings_files.app_directory(app_dir)
        settings = settings_files.run_settings(directory, conf, overrides or [], absolute=False)
    try:
        with bad_input():
            failure = Deployment(superlink, typer.echo, patience=patience).run(directory, settings)
    except KeyboardInterrupt:
        show_error("fedmitr: stopped following; a run that has started continues")
        raise typer.Exit(130) from None
    if failure:
        show_error(f"fedmitr: {failure}")
        raise typer.Exit(FAILED)
