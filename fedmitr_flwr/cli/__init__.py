"""The command ``fedmitr``. Each subcommand is a function in its own file and is registered here."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmitr_flwr.cli.common import BAD_INPUT
from fedmitr_flwr.cli.deployment.certs import certs
from fedmitr_flwr.cli.deployment.run import run
from fedmitr_flwr.cli.deployment.split import split
from fedmitr_flwr.cli.doctor import doctor
from fedmitr_flwr.cli.initial import initial
from fedmitr_flwr.cli.invert import invert
from fedmitr_flwr.cli.plain_help import PlainHelpCommand
from fedmitr_flwr.cli.runs.evaluate import evaluate
from fedmitr_flwr.cli.runs.export import export
from fedmitr_flwr.cli.runs.predict import predict
from fedmitr_flwr.cli.runs.report import report
from fedmitr_flwr.cli.runs.resume import resume
from fedmitr_flwr.cli.runs.simulate import simulate
from fedmitr_flwr.cli.settings import settings
from fedmitr_flwr.version import __version__

__all__ = ["BAD_INPUT", "app", "main"]

app = typer.Typer(
    name="fedmitr",
    help="One-shot federated learning for Vision Transformers, as a Flower app.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=True,
    pretty_exceptions_enable=False,
)
_OF_A_RUN = (simulate, resume, report, predict, evaluate, export)
_OF_A_DEPLOYMENT = (run, split, certs)
for command in (*_OF_A_RUN, *_OF_A_DEPLOYMENT, invert, initial, settings, doctor):
    app.command(cls=PlainHelpCommand)(command)


def main() -> None:
    """Run the command ``fedmitr``."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedmitr {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One-shot federated learning for Vision Transformers, as a Flower app."""
