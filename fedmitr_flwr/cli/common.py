"""Options, exit codes and output that all commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.settings import SettingsError

FAILED = 1
BAD_INPUT = 2

ConfArgument = Annotated[
    Path | None,
    typer.Argument(
        show_default=False, help="Settings file, such as conf/demo.toml. Without it, the default settings apply."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set one setting; overrides CONF. Repeatable."),
]
AppOption = Annotated[
    Path | None,
    typer.Option(
        "--app", metavar="DIR", help="Folder of the Flower app. Default: the folder that holds this command's code."
    ),
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", show_default=False, help="Folder of a completed run, such as outputs/demo.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@contextmanager
def bad_input() -> Iterator[None]:
    """Print the message of a `SettingsError` on stderr and exit with code 2."""
    try:
        yield
    except SettingsError as error:
        show_error("\n".join(f"fedmitr: {line}" for line in str(error).splitlines()))
        raise typer.Exit(BAD_INPUT) from None


def show_error(text: str) -> None:
    """Print a text on stderr, in red if stderr shows colours."""
    typer.secho(text, err=True, fg=typer.colors.RED)


def echo(line: str) -> None:
    """Print a line at once; click removes the colours of Flower's log if the output is not a terminal."""
    typer.echo(line)
    sys.stdout.flush()
