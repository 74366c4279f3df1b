"""The command ``fedmitr simulate``: simulate a federation on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fedmitr_flwr.cli.common import FAILED, AppOption, ConfArgument, SetOption, bad_input, echo, show_error
from fedmitr_flwr.launch import settings_files
from fedmitr_flwr.launch.live_view import LiveView
from fedmitr_flwr.launch.simulate import simulate as run_simulation
from fedmitr_flwr.runs.directory import EVENTS, UPLOADED, fresh_name, refuse_uploads
from fedmitr_flwr.settings import Settings


def simulate(
    conf: ConfArgument = None,
    overrides: SetOption = None,
    clients: Annotated[
        int | None,
        typer.Option("--clients", "-n", help="Number of simulated clients. Default: as in --federation, else 10."),
    ] = None,
    federation: Annotated[
        Path | None,
        typer.Option("--federation", metavar="FILE", help="Simulation config, such as conf/federation/100.toml."),
    ] = None,
    cpus: Annotated[
        int | None, typer.Option("--cpus", help="CPU cores for the clients. Default: as in --federation, else all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for results; overrides run.output.")
    ] = None,
    app_dir: AppOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all output of Flower and Ray.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Print plain lines instead of the live view.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the log only if the run fails.")] = False,
) -> None:
    """Simulate a federation on this machine.

    The command starts `flwr run` with Ray, and ends all its processes and removes its temporary files afterwards.
    Without CONF the default settings apply, which are those of the demo. Relative paths are relative to the current
    directory. The last line printed is the absolute path of the run's results.

    Exit code: 0 completed, 1 failed (also with too few uploads), 2 invalid input, 130 interrupted.
    """
    with bad_input():
        directory = settings_files.app_directory(app_dir)
        settings = settings_files.run_settings(directory, conf, overrides or [], output)
        config = settings_files.federation_config(federation, clients, cpus)
        if settings.run.name and not settings.run.resume:
            refuse_uploads(Path(settings.run.output) / settings.run.name, settings.run.name)
    settings = settings if settings.run.name else settings.replace(**{"run.name": fresh_name()})
    run_and_exit(directory, settings, config, live=not (plain or verbose or quiet), verbose=verbose, quiet=quiet)


def run_and_exit(
    directory: Path,
    settings: Settings,
    config: dict[str, settings_files.FederationValue],
    *,
    live: bool,
    verbose: bool,
    quiet: bool,
) -> NoReturn:
    """Run a simulation, print the path of its results and exit with its exit code."""
    with _shown(settings, live=live) as show:
        outcome = run_simulation(directory, settings, config, echo=show, verbose=verbose, quiet=quiet)
    if outcome.error:
        failed = "the run failed: " if outcome.exit_code == FAILED else ""
        show_error(f"fedmitr: {failed}{outcome.error}")
        if outcome.directory is not None and any(outcome.directory.glob(UPLOADED)):
            typer.echo(f"fedmitr: resume this run with: fedmitr resume {outcome.directory}", err=True)
    if outcome.directory is not None:
        typer.echo(outcome.directory)
    raise typer.Exit(outcome.exit_code)


@contextmanager
def _shown(settings: Settings, *, live: bool) -> Iterator[Callable[[str], None]]:
    """Yield the function that prints a log line, with the live view on a terminal if `live` is set."""
    console = Console()
    if not live or not console.is_terminal or console.is_dumb_terminal:
        yield echo
        return
    with LiveView(Path(settings.run.output) / settings.run.name / EVENTS, console) as view:
        yield view.echo
