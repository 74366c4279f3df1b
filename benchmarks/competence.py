"""Measure how well an upload alone reveals a client's classes, and what ensemble weights from it are worth.

    python -m benchmarks.competence                       # Dirichlet 0.05 to 0.5, with and without balanced softmax
    python -m benchmarks.competence --skews 0.1 --seeds 44

Clients are trained once per partition and cached, with the settings of `benchmarks.accuracy`. Each partition gives one
JSON line: the correlation of estimated with true class counts, the area under the ROC curve for presence against
absence of a class, and the ensemble's accuracy on the test images under each weighting. A table of means follows.
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
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.regression import pearson_corrcoef

from benchmarks.accuracy import ROOT, ensemble_accuracies, name_of, settings_for
from benchmarks.federation import Federation, train_federation
from fedmitr_flwr.ensemble.weighting import competence

COLUMNS = ("log correlation", "presence AUC", "histogram", "competence", "examples", "uniform")


def main(
    data: Annotated[str, typer.Option(help="data source: mnist-5k, digits, or npz:PATH (emoji10)")] = "mnist-5k",
    skews: Annotated[str, typer.Option(help="Dirichlet concentrations, separated by commas")] = "0.05,0.1,0.3,0.5",
    seeds: Annotated[str, typer.Option(help="partition seeds, separated by commas")] = "44,45,46",
    balanced: Annotated[str, typer.Option(help="values of train.balanced-softmax, separated by commas")] = "true,false",
    clients: Annotated[int, typer.Option(help="number of clients K")] = 10,
    cache: Annotated[Path, typer.Option(help="folder for trained uploads")] = Path("outputs/uploads-cache"),
    results: Annotated[Path | None, typer.Option(help="JSON lines file to append to")] = None,
) -> None:
    """Run all partitions and print the table."""
    path = results or ROOT / "benchmarks" / "results" / "competence.jsonl"
    table = Table("Dirichlet", "balanced softmax", *COLUMNS)
    for skew in skews.split(","):
        for softmax in balanced.split(","):
            rows = []
            for seed in seeds.split(","):
                settings = settings_for(data, skew, int(seed), {"train.balanced-softmax": softmax})
                federation = train_federation(settings, clients, cache)
                row = {**agreement(federation), **ensemble_accuracies(federation, settings)}
                about = {"data": name_of(data), "skew": skew, "balanced": softmax == "true", "seed": int(seed)}
                line = json.dumps({**about, "clients": clients, **row})
                with path.open("a") as file:
                    file.write(line + "\n")
                Console(stderr=True).print(line, highlight=False, soft_wrap=True)
                rows.append(row)
            means = [statistics.mean(row[column] for row in rows) for column in COLUMNS]
            cells = [*(f"{mean:.2f}" for mean in means[:2]), *(f"{100 * mean:.1f}" for mean in means[2:])]
            table.add_row(skew, softmax, *cells)
    Console(width=120).print(table)


def agreement(federation: Federation) -> dict[str, Any]:
    """Compare estimated with true class counts over all clients and classes; return correlation and AUC."""
    updates = torch.stack([client.state["head.weight"] for client in federation.clients])
    updates = updates - federation.initial["head.weight"]
    sizes = torch.tensor([client.num_examples for client in federation.clients])
    true = torch.tensor([client.histogram for client in federation.clients]).flatten()
    estimated = competence(updates, sizes).float().flatten()
    return {
        "log correlation": round(float(pearson_corrcoef(estimated.log1p(), true.float().log1p())), 3),
        "presence AUC": round(float(binary_auroc(estimated / estimated.max(), (true > 0).long())), 3),
    }


if __name__ == "__main__":
    typer.run(main)
