"""The command ``fedmitr certs``: make the keys and certificates of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import bad_input
from fedmitr_flwr.launch.certs import make
from fedmitr_flwr.settings.home import expand


def certs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for all files; made if missing.")],
    names: Annotated[
        list[str] | None,
        typer.Option("--name", "-n", metavar="HOST", help="Host name or IP address of the server. Repeatable."),
    ] = None,
    sites: Annotated[
        list[str] | None, typer.Option("--site", "-s", metavar="SITE", help="Name of a site. Repeatable.")
    ] = None,
    days: Annotated[
        int, typer.Option("--days", min=1, max=3650, help="Validity of the server's certificate in days.")
    ] = 397,
) -> None:
    """Make the keys and certificates of a federation.

    With --name the command makes the server's files. DIR/ca.crt is the certificate of the certificate authority (CA),
    for all machines; DIR/ca.key is its key, to be kept offline. DIR/server has the server's key, its certificate for
    all given names and for this machine, and its executor secret. A CA that is already in DIR signs the certificate;
    otherwise a new one is made.

    With --site the command makes a folder DIR/SITE for each site. It has the private key of the site's SuperNode, which
    only the site needs, the public key, to be registered at the server, and the site's executor secret. A site can
    make these files itself.

    Existing files are never overwritten; to replace a file, move it away first.

    Exit code: 0 made, 2 invalid input and nothing made.
    """
    with bad_input():
        made = make(expand(directory, "DIR"), names or [], sites or [], days)
    for path in made:
        typer.echo(path)
