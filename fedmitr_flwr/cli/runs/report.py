"""The command ``fedmitr report``: write a run's report again, or compare several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import bad_input
from fedmitr_flwr.settings import SettingsError
from fedmitr_flwr.settings.home import expand


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folder of a run, or folders of two to four runs to compare.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File to write. Default: RUN/report.html, or comparison.html."
        ),
    ] = None,
) -> None:
    """Write a run's report again, or compare several runs.

    The report is one HTML file that needs no network. A run writes its own report when it ends. With several runs the
    page shows them side by side and is written to comparison.html in the current directory by default. The last line
    printed is the path of the file.

    Exit code: 0 written, 2 invalid input.
    """
    with bad_input():
        from fedmitr_flwr.results.report import REPORT, comparison_page, load_run, run_page, write_page
        from fedmitr_flwr.results.report.compare import MOST_RUNS
        from fedmitr_flwr.runs.directory import REPORT_DATA

        if len(runs) > MOST_RUNS:
            raise SettingsError(("RUN", f"{len(runs)} runs", f"a page compares at most {MOST_RUNS} runs"))
        loaded = [load_run(run) for run in runs]
        for run in loaded:
            if not run.report:
                allowed = (
                    f"was made by version {run.version}, which did not write {REPORT_DATA}; a report needs that file"
                )
                raise SettingsError(("RUN", str(run.path), allowed))
        page = run_page(loaded[0]) if len(loaded) == 1 else comparison_page(loaded)
        file = output or (loaded[0].path / REPORT if len(loaded) == 1 else Path("comparison.html"))
        target = expand(file, "--output").absolute()
        try:
            write_page(target, page)
        except OSError as error:
            raise SettingsError(("--output", str(file), f"cannot be written: {error.strerror or error}")) from None
    typer.echo(target)
