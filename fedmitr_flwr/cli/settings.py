"""``fedmitr settings``."""

from __future__ import annotations

import shutil
from enum import StrEnum
from typing import Annotated

import typer

from fedmitr_flwr.settings import docs


class Format(StrEnum):
    """How ``fedmitr settings`` prints."""

    TABLE = "table"
    MARKDOWN = "markdown"
    TOML = "toml"
    JSON = "json"


def settings(
    style: Annotated[Format, typer.Option("--format", "-f", help="How to print them.")] = Format.TABLE,
) -> None:
    """Print every setting: key, default, allowed values and what it does.

    Exit code: 0 printed, 2 bad input.
    """
    if style is Format.TABLE:
        text = docs.to_table(shutil.get_terminal_size((100, 24)).columns)
    else:
        text = {Format.MARKDOWN: docs.to_markdown, Format.TOML: docs.to_toml, Format.JSON: docs.to_json}[style]()
    typer.echo(text, nl=False)
