"""Measure an upper limit for synthetic images: distillation on the clients' own images, which no server has.

    python -m benchmarks.real_images --skews 0.1,0.3 --seeds 44,45,46
    python -m benchmarks.real_images --data npz:PATH/emoji10.npz

Uploads, ensemble, start, number of images and number of steps are those of `run.method = random-images`, which is run
for comparison. Only the images differ: each image of the clients is used once unchanged, and then with
`distill.augment` until there are enough. The difference between the two results is what synthetic images of any kind
can be worth for this student in this number of steps. No setting is chosen by it. Each run adds one JSON line to
--results; runs that are already there are not repeated.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.accuracy import ROOT, hardware, name_of, read, settings_for
from benchmarks.federation import Federation, train_federation
from benchmarks.fingerprint import results_code
from benchmarks.recipes import split_changes
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.pipeline.methods.random_images import distil_on
from fedmitr_flwr.results.evaluate import evaluate
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.training.augment import augment

IMAGES = ("random", "real")


def main(
    data: Annotated[str, typer.Option(help="data source: mnist-5k, digits, or npz:PATH (emoji10)")] = "mnist-5k",
    skews: Annotated[str, typer.Option(help="Dirichlet concentrations, separated by commas, and iid")] = "0.1",
    seeds: Annotated[str, typer.Option(help="partition seeds, separated by commas")] = "44,45,46",
    clients: Annotated[int, typer.Option(help="number of clients K")] = 10,
    change: Annotated[
        list[str] | None, typer.Option(help="key=value that changes a setting for all runs; repeatable")
    ] = None,
    cache: Annotated[Path, typer.Option(help="folder for trained uploads")] = Path("outputs/uploads-cache"),
    results: Annotated[Path, typer.Option(help="JSON lines file to append to")] = ROOT
    / "benchmarks"
    / "results"
    / "real_images.jsonl",
) -> None:
    """Run all that is not stored yet and print the table."""
    changes, rows = split_changes(change or ()), read(results)
    mine = []
    for skew, seed in ((skew, int(seed)) for skew in skews.split(",") for seed in seeds.split(",")):
        for images in IMAGES:
            about = {"data": name_of(data), "skew": skew, "clients": clients, "seed": seed, "images": images}
            about |= {"changes": changes, "code": results_code(name_of(data))}
            found = [row for row in rows if about.items() <= row.items()]
            if not found:
                settings = settings_for(data, skew, seed, changes)
                found = [{**about, **run(train_federation(settings, clients, cache), settings, images)}]
                with results.open("a") as file:
                    file.write(json.dumps(found[0]) + "\n")
            mine += found[:1]
    Console(width=120).print(table(mine))


def run(federation: Federation, settings: Settings, images: str) -> dict[str, Any]:
    """Train a student on random images or on the clients' own; return accuracies in 0..1 on the test images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = settings.replace(**{"run.method": "random-images"})
    inputs = federation.inputs(settings, device=device)
    result = METHODS["random-images"](inputs) if images == "random" else on_real_images(federation, inputs)
    found = evaluate(result, federation.source.test, federation.spec, settings.model, device)
    return {**{name: round(value, 4) for name, value in found.accuracy().items()}, "hardware": hardware()}


def on_real_images(federation: Federation, inputs: PipelineInputs) -> PipelineResult:
    """Distil the ensemble on the clients' own images."""
    train, spec = federation.source.train, federation.spec
    own = spec.normalise(train.images(torch.arange(len(train))))

    def draw(count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
        times = range(-(-count // len(own)))
        first, *more = torch.cat([torch.randperm(len(own), generator=generator) for _ in times])[:count].split(len(own))
        views = [augment(own[rows], inputs.settings.distill.augment, generator) for rows in more]
        return torch.cat([own[first], *views])

    return distil_on(inputs, draw)


def table(rows: list[dict[str, Any]]) -> Table:
    """Return a table of means in percent over partitions; differences are taken within each partition."""
    out = Table("Dirichlet", "fedavg", *IMAGES, "real - random", "ensemble", "partitions")
    for skew in dict.fromkeys(row["skew"] for row in rows):
        here = {(row["images"], row["seed"]): row for row in rows if row["skew"] == skew}
        seeds = sorted({seed for _, seed in here})
        first = [here["random", seed] for seed in seeds]
        gains = [100 * (here["real", seed]["global"] - here["random", seed]["global"]) for seed in seeds]
        spread = f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
        columns = [
            [row["fedavg"] for row in first],
            *([here[images, seed]["global"] for seed in seeds] for images in IMAGES),
        ]
        means = [f"{100 * statistics.mean(column):.1f}" for column in columns]
        known = f"{100 * statistics.mean(row['ensemble'] for row in first):.1f}"
        out.add_row(skew, *means, f"{statistics.mean(gains):+.1f}{spread}", known, str(len(seeds)))
    return out


if __name__ == "__main__":
    typer.run(main)
