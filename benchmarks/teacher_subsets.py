"""Measure the effect of inverting each batch from few teachers (`inversion.teachers-per-batch`) on the global model.

    python -m benchmarks.teacher_subsets --clients 10,50 --counts 0,2,5,10 --seeds 1,2,3

Runs with the same number of clients and the same seed start from the same uploads and differ only in this setting; 0
means all teachers. Each run adds one JSON line to --results; runs that are already there are not repeated. The table
has the mean accuracy of the global model in percent, the mean difference from all teachers in points with its smallest
and largest value over the seeds, and the seconds of inversion.
"""

from __future__ import annotations

import json
import platform
import statistics
import tomllib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.recipes import parse_value, run_one, split_changes
from fedmitr_flwr.settings import Settings

HEAD = (
    "| K | teachers a batch | global, % | against all, points (smallest, largest) | inversion, s | seeds |\n"
    "|---|---|---|---|---|---|\n"
)


def main(
    clients: Annotated[str, typer.Option(help="numbers of clients K, separated by commas")] = "10,50",
    counts: Annotated[
        str, typer.Option(help="teachers per batch, separated by commas; 0 (all teachers) always runs")
    ] = "2,5,10",
    seeds: Annotated[str, typer.Option(help="partition seeds, separated by commas")] = "1,2,3",
    conf: Annotated[Path | None, typer.Option(help="settings file (TOML); without it the defaults")] = None,
    change: Annotated[
        list[str] | None, typer.Option(help="key=value that changes a setting for all runs; repeatable")
    ] = None,
    split: Annotated[str, typer.Option(help="split to measure on: validation or test")] = "validation",
    cache: Annotated[Path, typer.Option(help="folder for trained uploads")] = Path("outputs/uploads-cache"),
    results: Annotated[Path, typer.Option(help="JSON lines file to append to")] = Path(
        "benchmarks/results/teacher_subsets.jsonl"
    ),
) -> None:
    """Run all that is not stored yet and print the table of all runs."""
    base = {} if conf is None else tomllib.loads(conf.read_text())
    flat = {f"{stage}.{name}": value for stage, part in base.items() for name, value in part.items()}
    changes = split_changes(change or ())
    flat |= {key: parse_value(text) for key, text in changes.items()}
    about = {"conf": "defaults" if conf is None else conf.stem, "changes": changes, "split": split}
    hardware = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    for K in numbers(clients):
        for seed in numbers(seeds):
            for count in sorted({0, *(count for count in numbers(counts) if count < K)}):
                key = {**about, "clients": K, "seed": seed, "count": count}
                if any(key.items() <= row.items() for row in rows):
                    continue
                own = {"partition.seed": seed, "inversion.teachers-per-batch": count}
                rows.append({**key, **run_one(Settings.from_run_config({**flat, **own}), K, split, cache)})
                with results.open("a") as file:
                    file.write(json.dumps({**rows[-1], "hardware": hardware}) + "\n")
    print(table([row for row in rows if about.items() <= row.items()]))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table; differences are taken between runs with the same seed."""
    found = {(row["clients"], row["count"], row["seed"]): row for row in rows}
    lines = []
    for K, count in sorted({(K, count) for K, count, _ in found}):
        same = [row for (k, c, _), row in sorted(found.items()) if (k, c) == (K, count)]
        points = [
            100 * (row["global"] - found[K, 0, row["seed"]]["global"]) for row in same if (K, 0, row["seed"]) in found
        ]
        against = f"{statistics.mean(points):+.1f} ({min(points):+.1f}, {max(points):+.1f})" if points else ""
        cells = [
            str(K),
            "all" if count == 0 else str(count),
            f"{100 * statistics.mean(row['global'] for row in same):.1f}",
            "" if count == 0 else against,
            f"{statistics.mean(row['seconds_invert'] for row in same):.0f}",
            str(len(same)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return HEAD + "\n".join(lines)


def numbers(text: str) -> list[int]:
    """Parse integers that are separated by commas."""
    return [int(part) for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    typer.run(main)
