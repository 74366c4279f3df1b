"""The ``fedmitr`` command: run simulations, look settings up, make the common initialisation."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import fedmitr_flwr
from fedmitr_flwr import run_files
from fedmitr_flwr.certs import certs
from fedmitr_flwr.deploy import run
from fedmitr_flwr.settings import SettingsError
from fedmitr_flwr.settings import docs as settings_docs
from fedmitr_flwr.simulate import simulate as run_simulation
from fedmitr_flwr.split import split

BAD_INPUT = 2

app = typer.Typer(
    name="fedmitr",
    help="One-shot federated learning for Vision Transformers, as a Flower app.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfArgument = Annotated[
    Path | None,
    typer.Argument(show_default=False, help="Settings file, such as conf/demo.toml. Without it: the app's defaults."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="One setting, wins over CONF; repeatable."),
]
AppOption = Annotated[
    Path | None,
    typer.Option("--app", metavar="DIR", help="Folder of the Flower app. Default: where this command comes from."),
]


class Format(StrEnum):
    """How ``fedmitr settings`` prints."""

    TABLE = "table"
    MARKDOWN = "markdown"
    TOML = "toml"
    JSON = "json"


def main() -> None:
    """Entry point of the ``fedmitr`` command."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedmitr {fedmitr_flwr.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One-shot federated learning for Vision Transformers, as a Flower app."""


@app.command()
def simulate(
    conf: ConfArgument = None,
    overrides: SetOption = None,
    clients: Annotated[
        int | None, typer.Option("--clients", "-n", help="Simulated clients. Default: as in --federation, else 10.")
    ] = None,
    federation: Annotated[
        Path | None,
        typer.Option("--federation", metavar="FILE", help="Simulation config, such as conf/federation/100.toml."),
    ] = None,
    cpus: Annotated[
        int | None, typer.Option("--cpus", help="CPU cores for the clients. Default: all, or as in --federation.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where results go; run.output.")
    ] = None,
    app_dir: AppOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all that Flower and Ray print.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the log only when the run fails.")] = False,
) -> None:
    """Run a simulation on this machine: a real `flwr run` on Ray, and nothing left behind.

    CONF is a settings file, such as conf/demo.toml; without it the app's defaults apply, which are the demo's.

    Relative paths count from the current directory. The last line printed is the absolute path of the run's
    results. Exit code: 0 completed, 1 failed (also below its quorum), 2 bad input, 130 interrupted.
    """
    with _bad_input():
        directory = run_files.app_directory(app_dir)
        settings = run_files.run_settings(directory, conf, overrides or [], output)
        config = run_files.federation_config(federation, clients, cpus)
    outcome = run_simulation(directory, settings, config, echo=_echo, verbose=verbose, quiet=quiet)
    if outcome.error:
        failed = "the run failed: " if outcome.exit_code == 1 else ""
        typer.secho(f"fedmitr: {failed}{outcome.error}", err=True, fg=typer.colors.RED)
    if outcome.directory is not None:
        typer.echo(outcome.directory)
    raise typer.Exit(outcome.exit_code)


@app.command()
def settings(
    style: Annotated[Format, typer.Option("--format", "-f", help="How to print them.")] = Format.TABLE,
) -> None:
    """Print every setting: key, default, allowed values and what it does."""
    if style is Format.TABLE:
        text = settings_docs.to_table(shutil.get_terminal_size((100, 24)).columns)
    else:
        text = {
            Format.MARKDOWN: settings_docs.to_markdown,
            Format.TOML: settings_docs.to_toml,
            Format.JSON: settings_docs.to_json,
        }[style]()
    typer.echo(text, nl=False)


@app.command()
def initial(conf: ConfArgument = None, overrides: SetOption = None, app_dir: AppOption = None) -> None:
    """Make the common initialisation that a run would start from, and say where it is cached.

    For `model.init = glyphs` this renders letters and trains on them, once for each model and image size;
    pretrained weights are downloaded. Runs do this by themselves when needed.
    """
    with _bad_input():
        run = run_files.run_settings(run_files.app_directory(app_dir), conf, overrides or [])
        # PyTorch takes seconds to import, and only this command needs it.
        from fedmitr_flwr.data import load_spec
        from fedmitr_flwr.glyphs import cache_path
        from fedmitr_flwr.models import initial_state
        from fedmitr_flwr.rundir import console_log

        with console_log():
            spec = load_spec(run.data)
            state = initial_state(run, spec)
    count = sum(value.numel() for value in state.values())
    typer.echo(f"{run.model.init}: {len(state)} tensors, {count:,} numbers", err=True)
    if run.model.init == "glyphs":
        typer.echo(cache_path(run, spec))


for _command in (run, split, certs):
    app.command()(_command)


@contextmanager
def _bad_input() -> Iterator[None]:
    """Turn a `SettingsError` into its message on stderr and exit code 2."""
    try:
        yield
    except SettingsError as error:
        typer.secho("\n".join(f"fedmitr: {line}" for line in str(error).splitlines()), err=True, fg=typer.colors.RED)
        raise typer.Exit(BAD_INPUT) from None


def _echo(line: str) -> None:
    # Flower colours its log even in pipes and files; click takes the colours out where they don't belong.
    typer.echo(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
