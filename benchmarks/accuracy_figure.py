"""Draw accuracy against cost from the stored results of `benchmarks.accuracy`.

    python -m benchmarks.accuracy_figure                              # MNIST-5k, Dirichlet(0.1)
    python -m benchmarks.accuracy_figure --data emoji10 --skew 0.3

Each method has one curve over its budgets: the main settings, and runs with `--change` of the keys in `BUDGET`. Runs
without random images (`distill.noise=0`) have a separate curve. Cost is in FLOPs, because rows may come from different
machines. Bars are the standard deviation over partition seeds. The horizontal lines are one-shot FedAvg and the
ensemble with its best weighting.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from benchmarks.accuracy import ROOT, Row, best_ensemble, read, seed_means

RESULTS = ROOT / "benchmarks" / "results"
BUDGET = {"distill.steps", "distill.noise", "inversion.images", "inversion.iterations"}
ALONE = ", no random images"


def main(
    data: Annotated[
        str, typer.Option(help="data name in the name of the results file: mnist-5k, digits or emoji10")
    ] = "mnist-5k",
    skew: Annotated[str, typer.Option(help="Dirichlet concentration, or iid")] = "0.1",
    clients: Annotated[int, typer.Option(help="number of clients K")] = 10,
    output: Annotated[
        Path | None, typer.Option(help="PNG file to write; default: in the folder of the results")
    ] = None,
) -> None:
    """Draw the picture and print its path."""
    source = RESULTS / f"accuracy-{data}.jsonl"
    rows = [row for row in read(source) if row["skew"] == skew and row["clients"] == clients]
    rows = [row for row in rows if BUDGET.issuperset(row["changes"])]
    if not rows:
        raise SystemExit(f"{source} has no results of Dirichlet({skew}) with {clients} clients")
    path = output or RESULTS / f"accuracy-{data}-{skew}.png"
    draw(
        [row for row in rows if row["code"] == rows[-1]["code"]], f"{data}, {clients} clients, Dirichlet({skew})", path
    )
    print(path)


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Write the picture of these rows to `path`."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for curve in dict.fromkeys(curve_of(row) for row in rows if row["teraflops"] > 0):
        points = budgets([row for row in rows if curve_of(row) == curve])
        cost, means, spreads = zip(*points, strict=True)
        line = "none" if curve.endswith(ALONE) else "-"  # both steps and images vary, so a line would mislead
        axes.errorbar(cost, means, spreads, marker="o", capsize=3, linestyle=line, label=curve)
    best, ensembles = best_ensemble(rows)
    fedavg = 100 * statistics.mean(row["fedavg"] for row in rows)
    axes.axhline(statistics.mean(ensembles), color="black", linewidth=1, label=f"ensemble ({best} weights)")
    axes.axhline(fedavg, color="black", linewidth=1, linestyle=":", label="one-shot FedAvg")
    axes.set(title=title, xlabel="FLOPs of the server, 10¹²", ylabel="accuracy on test images, %")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=150)


def curve_of(row: Row) -> str:
    """Return the name of a row's curve: its method, and whether it has no random images."""
    alone = float(row["changes"].get("distill.noise", 1)) == 0
    return f"{row['method']}{ALONE if alone else ''}"


def budgets(rows: list[Row]) -> list[tuple[float, float, float]]:
    """Return 10^12 FLOPs, mean accuracy and its spread (percent, over partition seeds) of each budget, by cost."""
    points = []
    for changes in dict.fromkeys(tuple(sorted(row["changes"].items())) for row in rows):
        same = [row for row in rows if tuple(sorted(row["changes"].items())) == changes]
        means = seed_means(same)
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        points.append((statistics.mean(row["teraflops"] for row in same), statistics.mean(means), spread))
    return sorted(points)


if __name__ == "__main__":
    typer.run(main)
