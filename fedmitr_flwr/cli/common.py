"""What all commands share: options, exit codes, and how mistakes and results are shown."""

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
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", show_default=False, help="Folder of a completed run, as its last line said.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn a `SettingsError` into its message on stderr and exit code 2."""
    try:
        yield
    except SettingsError as error:
        show_error("\n".join(f"fedmitr: {line}" for line in str(error).splitlines()))
        raise typer.Exit(BAD_INPUT) from None


def show_error(text: str) -> None:
    """Print to stderr, in red where there are colours."""
    typer.secho(text, err=True, fg=typer.colors.RED)


def echo(line: str) -> None:
    """Print a line now; click takes the colours that Flower puts into its log out where they don't belong."""
    typer.echo(line)
    sys.stdout.flush()
