"""Compare settings of the server's stages on the same uploads, by default on the validation split.

    python -m benchmarks.recipes --seeds 1,2,3 \
        --variant "plain:" --variant "no noise:distill.noise=0;distill.mix=0"

Each variant is a name and changes to the default settings (or to those of --conf). The command prints a table and
appends one JSON line per run to --results.
"""

from __future__ import annotations

import json
import logging
import platform
import statistics
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.federation import train_federation
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.results.evaluate import evaluate
from fedmitr_flwr.settings import RunConfigValue, Settings

COLUMNS = ("local_mean", "fedavg", "ensemble", "global")


def main(
    variant: Annotated[list[str], typer.Option(help='a variant as "name:key=value;key=value"; repeatable')],
    seeds: Annotated[str, typer.Option(help="partition seeds, separated by commas")] = "1,2,3",
    conf: Annotated[
        Path | None, typer.Option(help="settings file (TOML) that the changes apply to; without it the defaults")
    ] = None,
    clients: Annotated[int, typer.Option(help="number of clients K")] = 10,
    split: Annotated[
        str,
        typer.Option(
            help="splits, separated by commas: validation, test, or train (the clients' images, which no student sees)"
        ),
    ] = "validation",
    cache: Annotated[Path, typer.Option(help="folder for trained uploads")] = Path("outputs/uploads-cache"),
    results: Annotated[Path | None, typer.Option(help="JSON lines file to append to")] = None,
    verbose: Annotated[bool, typer.Option(help="show the progress of the stages")] = False,
) -> None:
    """Run every variant on every partition seed; print accuracies in percent and seconds."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    base = {} if conf is None else tomllib.loads(conf.read_text())
    flat = {f"{stage}.{name}": value for stage, part in base.items() for name, value in part.items()}
    table = Table("variant", *COLUMNS, "spread", "invert s", "distill s")
    for text in variant:
        name, _, changes = text.partition(":")
        own = split_changes(item for item in changes.split(";") if item.strip())
        parsed = {key: parse_value(value) for key, value in own.items()}
        rows = []
        for seed in (int(seed) for seed in seeds.split(",")):
            settings = Settings.from_run_config({**flat, **parsed, "partition.seed": seed})
            row = run_one(settings, clients, split, cache)
            rows.append(row)
            if results is not None:
                about = {"variant": name, "changes": changes, "seed": seed, "split": split, "clients": clients}
                hardware = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
                with results.open("a") as file:
                    file.write(json.dumps({**about, **row, "hardware": hardware}) + "\n")
        means = [f"{100 * statistics.mean(row[column] for row in rows):.1f}" for column in COLUMNS]
        spread = " ".join(f"{100 * row['global']:.1f}" for row in rows)
        seconds = [
            f"{statistics.mean(row.get(f'seconds_{stage}', 0.0) for row in rows):.0f}"
            for stage in ("invert", "distill")
        ]
        table.add_row(name, *means, spread, *seconds)
        Console(width=140).print(f"{name}: {' '.join(means)} | {spread} | {' '.join(seconds)}")
    Console(width=140).print(table)


def run_one(settings: Settings, num_clients: int, splits: str, cache: Path) -> dict[str, float]:
    """Run one pipeline; return accuracies in 0..1 and seconds.

    From the second split on, the keys of the accuracies end with the name of the split.
    """
    federation = train_federation(settings, num_clients, cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    result = METHODS[settings.run.method](federation.inputs(settings, device=device))
    total = time.perf_counter() - start
    seconds = {f"seconds_{stage}": value for stage, value in result.seconds.items()}
    accuracy: dict[str, float] = {}
    for number, split in enumerate(splits.split(",")):
        found = evaluate(result, getattr(federation.source, split), federation.spec, settings.model, device)
        accuracy |= {f"{name}_{split}" if number else name: value for name, value in found.accuracy().items()}
    return {**accuracy, **seconds, "seconds_total": total}


def split_changes(texts: Iterable[str]) -> dict[str, str]:
    """Split texts of the form ``key=value`` into a dict."""
    changes = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"{text!r} is not key=value")
        changes[key.strip()] = value.strip()
    return changes


def parse_value(text: str) -> RunConfigValue:
    """Parse a TOML value; return the text itself if it is not one."""
    try:
        value: RunConfigValue = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    return value


if __name__ == "__main__":
    typer.run(main)
