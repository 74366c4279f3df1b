"""Show that changed code gives the stored results, so that the stored lines remain valid.

    python -m benchmarks.same_results --clients 5 --skews 0.1 --seeds 44
    python -m benchmarks.same_results --data npz:PATH/emoji10.npz --seeds 44 --methods fedmitr,random-images
    python -m benchmarks.same_results --data digits --seeds 44 --against PATH   # a checkout of the older code

The command repeats the chosen lines of `benchmarks/results/accuracy-DATA.jsonl` and compares all numbers except times.
It takes only lines that the tables use and that a machine like this one wrote (processor, cores, threads). If all
numbers are equal, `results/same-code.json` maps the fingerprint of the new code to the old one: the tables keep their
lines, and new lines join them.

Processors differ in the last digits of their sums. On a processor that did not write the lines, equal code therefore
gives other numbers than the stored ones. With `--against` the older code also runs here, from its checkout, and the new
numbers are compared with its numbers; any machine may have written the lines.

Use it after a change that moves code, or that handles a case which no stored run contains. Lines from a GPU are not
repeated on a CPU: a change of code that only runs on a GPU needs new lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.accuracy import (
    ROOT,
    Row,
    ensemble_accuracies,
    hardware,
    main_rows,
    name_of,
    read,
    recipe,
    run_method,
    settings_for,
)
from benchmarks.federation import train_federation
from benchmarks.fingerprint import SAME, fingerprint

TIMES = {"seconds", "cpu_seconds"}
OLDER = """
import json, sys
from pathlib import Path
from benchmarks.fingerprint import results_code
from benchmarks.same_results import name_of, run_again
data, row, cache = json.loads(sys.argv[1])
print(json.dumps([results_code(name_of(data)), run_again(data, row, Path(cache))]))
"""
"""What a checkout of older code is asked to run: its code, and its numbers of one line."""


def main(
    data: Annotated[str, typer.Option(help="data source: mnist-5k, digits, or npz:PATH (emoji10)")] = "mnist-5k",
    skews: Annotated[str, typer.Option(help="Dirichlet concentrations, separated by commas, and iid")] = "0.1",
    seeds: Annotated[str, typer.Option(help="partition seeds, separated by commas")] = "44",
    methods: Annotated[str, typer.Option(help="values of run.method, separated by commas; default: all")] = "",
    clients: Annotated[int, typer.Option(help="number of clients K")] = 10,
    cache: Annotated[Path, typer.Option(help="folder for trained uploads")] = Path("outputs/uploads-cache"),
    against: Annotated[
        Path | None, typer.Option(help="checkout of the code that wrote the lines; it runs here too")
    ] = None,
) -> None:
    """Compare and store the result if all lines are equal. Exit code: 0 all equal, 1 some differ, 2 no line found."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    rows = read(ROOT / "benchmarks" / "results" / f"accuracy-{name_of(data)}.jsonl")
    code = main_rows(rows)[-1]["code"]
    chosen = [
        row
        for row in rows
        if (row["code"], row["clients"]) == (code, clients)
        and (against is not None or row["hardware"] == hardware())
        and row["skew"] in skews.split(",")
        and str(row["seed"]) in seeds.split(",")
        and (not methods or row["method"] in methods.split(","))
        and row["recipe"] == recipe(settings_for(data, row["skew"], row["seed"], row["changes"]), row["changes"])
    ]
    if not chosen:
        console.print(
            f"no stored line of {name_of(data)} with code {code} and hardware {hardware()} matches the options"
        )
        raise typer.Exit(2)
    differing = 0
    for row in chosen:
        expected = row if against is None else {**row, **run_older(against, data, row, cache)}
        found = differences(expected, run_again(data, row, cache), "stored" if against is None else "by older code")
        differing += bool(found)
        about = " ".join(f"{key}={row[key]}" for key in ("skew", "seed", "distill_seed", "method", "changes"))
        console.print(f"{about}: {'; '.join(found) or 'equal'}")
    if differing:
        console.print(f"{differing} of {len(chosen)} lines differ: code {fingerprint()} needs new lines")
        raise typer.Exit(1)
    remember(name_of(data), code, len(chosen), both=against is not None)
    console.print(f"all {len(chosen)} lines are equal: code {fingerprint()} counts as {code}")


def run_again(data: str, row: Row, cache: Path) -> Row:
    """Compute the row of a stored line again with today's code."""
    base = settings_for(data, row["skew"], row["seed"], row["changes"])
    federation = train_federation(base, row["clients"], cache)
    found = run_method(federation, base.replace(**{"run.method": row["method"]}), row["distill_seed"])
    return {**found, "ensembles": ensemble_accuracies(federation, base)}


def run_older(checkout: Path, data: str, row: Row, cache: Path) -> Row:
    """Compute the row of a stored line with the code of a checkout, in a process of its own.

    Raises
    ------
    typer.Exit
        With code 2 if that code is not the one that wrote the line.
    """
    place = checkout.resolve()
    asked = json.dumps([data, row, str(cache.resolve() / "older")])
    done = subprocess.run(
        [sys.executable, "-c", OLDER, asked],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    code, found = json.loads(done.stdout.splitlines()[-1])
    if code != row["code"]:
        Console(stderr=True).print(f"{place} holds code {code}; the stored lines are those of code {row['code']}")
        raise typer.Exit(2)
    older: Row = found
    return older


def differences(stored: Row, found: Row, origin: str = "stored") -> list[str]:
    """Return the numbers that differ, except times."""
    return [
        f"{key}: {stored[key]} {origin}, {value} now"
        for key, value in found.items()
        if key not in TIMES and stored[key] != value
    ]


def remember(data: str, code: str, lines: int, *, both: bool) -> None:
    """Store that today's code gives the results of `code` for a data set, and whether both codes ran here."""
    if fingerprint() == code:
        return
    known = json.loads(SAME.read_text("utf-8")) if SAME.is_file() else {}
    entry = {"as": code, "lines": lines, "hardware": hardware()}
    known.setdefault(data, {})[fingerprint()] = {**entry, "both_run": True} if both else entry
    SAME.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
