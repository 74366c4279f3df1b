r"""A complete plain ``--help`` with the versions of typer and click that Flower 1.41 allows.

Flower requires typer below 0.21. With click 8.5, that typer omits the descriptions of arguments, and with rich
installed it writes ``\[default: 3]``. This module corrects both. It changes nothing with versions that have neither
error.
"""

from __future__ import annotations

import re
from typing import get_type_hints

import click
from typer.core import TyperArgument, TyperCommand

_TWICE = re.compile(r"^Positional arguments:\n.*?(?=^Arguments:\n)", re.M | re.S)


class PlainHelpCommand(TyperCommand):
    """A command whose help describes each argument once and has no backslash before a bracket."""

    def get_help(self, ctx: click.Context) -> str:
        """Return the help text."""
        hints = get_type_hints(self.callback, include_extras=True) if self.callback else {}
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and not parameter.help and parameter.name in hints:
                described = getattr(hints[parameter.name], "__metadata__", ())
                parameter.help = next((info.help for info in described if getattr(info, "help", None)), None)
        # Click 8.5 lists the arguments that have a help text, and typer lists them a second time.
        return _TWICE.sub("", super().get_help(ctx)).replace("\\[", "[")
