"""The command ``fedmitr doctor``: check whether runs can work on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import FAILED, JsonOption


def doctor(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for results; the space on its disk is checked."),
    ] = Path("outputs"),
    as_json: JsonOption = False,
) -> None:
    """Check whether runs can work on this machine.

    The command checks Python, packages, Flower, GPU, disk, memory and ports, and looks for a SuperLink that an earlier
    `flwr run` left running.

    Exit code: 0 no problem found, 1 a problem that makes runs fail.
    """
    from fedmitr_flwr.launch.doctor import examine

    findings = examine(output)
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        marks = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
        colours = {"ok": typer.colors.GREEN, "note": typer.colors.YELLOW, "problem": typer.colors.RED}
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mark = typer.style(marks[finding.level], fg=colours[finding.level])
            typer.echo(f"{mark} {finding.name:<{width}}  {finding.found}")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(FAILED)
