"""``fedmitr certs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import bad_input
from fedmitr_flwr.launch.certs import make


def certs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where everything goes; made if it isn't there.")],
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name", "-n", metavar="HOST", help="Name or IP address under which the server is reached; repeatable."
        ),
    ] = None,
    sites: Annotated[
        list[str] | None, typer.Option("--site", "-s", metavar="SITE", help="A site that takes part; repeatable.")
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="Validity of the server's certificate.")] = 397,
) -> None:
    """Make the keys and certificates of a federation in DIR.

    With --name the server's: DIR/ca.crt (for everyone), DIR/ca.key (keep it offline), and in DIR/server its key,
    its certificate for all these names and for this machine, and its executor secret. A CA that is in DIR already
    signs; otherwise one is made.

    With --site a folder DIR/SITE for each: the SuperNode's private key, which nobody else needs, its public key,
    to be registered at the server, and the site's executor secret. A site can make its own.

    Nothing is ever overwritten: to replace something, move the old files away first.
    Exit code: 0 made, 2 bad input, and then nothing was made.
    """
    with bad_input():
        made = make(directory, names or [], sites or [], days)
    for path in made:
        typer.echo(path)
