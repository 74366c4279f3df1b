"""``fedmitr report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmitr_flwr.cli.common import bad_input
from fedmitr_flwr.settings import SettingsError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; two to four are compared.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write the page. Default: RUN/report.html."),
    ] = None,
) -> None:
    """Write a run's report again, or compare several runs side by side on one page.

    The page is one HTML file that needs no network. Runs write their own report when they end. For several
    runs the default file is comparison.html in the current directory. The last line printed is the file's path.
    Exit code: 0 written, 2 bad input.
    """
    with bad_input():
        from fedmitr_flwr.results.report import REPORT, comparison_page, load_run, run_page, write_page
        from fedmitr_flwr.results.report.compare import MOST_RUNS
        from fedmitr_flwr.runs.directory import REPORT_DATA

        if len(runs) > MOST_RUNS:
            raise SettingsError(("RUN", f"{len(runs)} of them", f"at most {MOST_RUNS} can be compared on one page"))
        loaded = [load_run(run) for run in runs]
        for run in loaded:
            if not run.report:
                allowed = f"made by version {run.version}, which wrote no {REPORT_DATA}; a report needs it"
                raise SettingsError(("RUN", str(run.path), allowed))
        page = run_page(loaded[0]) if len(loaded) == 1 else comparison_page(loaded)
        file = output or (loaded[0].path / REPORT if len(loaded) == 1 else Path("comparison.html"))
        try:
            write_page(file.expanduser().absolute(), page)
        except OSError as error:
            raise SettingsError(("--output", str(file), f"can't be written: {error.strerror or error}")) from None
    typer.echo(file.expanduser().absolute())
