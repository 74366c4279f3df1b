"""Compare accuracy and inversion time of the default settings with those of SMI's full schedule.

    python -m benchmarks.accuracy --skews 0.1 --methods fedmitr    # accuracies with the default settings
    python -m benchmarks.accuracy --skews 0.1 --methods fedmitr \\
        --change inversion.iterations=4000 --change inversion.stops=50,100,200,300    # accuracies with SMI's schedule
    python -m benchmarks.time_to_quality    # reads both (null if one is missing) and measures the time of inversion

Both invert the same number of images from the same ensemble, and the same student learns from these and from the same
random images. Time is CPU time of one thread, with the demo's ViT and ten teachers of random weights; it does not
depend on the weights. The default settings are timed with our engine. SMI's schedule is projected for the plain
reference from measured iterations of each stage. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated

import torch
import typer

from benchmarks.accuracy import ROOT, Row, mean_of, read
from benchmarks.inversion.bench import DEMO_MODEL, Bench, Case, hardware, schedule
from fedmitr_flwr.settings import InversionSettings, Settings
from fedmitr_flwr.stages.inversion.batch import InversionTask
from fedmitr_flwr.stages.inversion.sparse import invert

SMI = {"inversion.iterations": "4000", "inversion.stops": "50,100,200,300"}


def main(
    skew: Annotated[str, typer.Option(help="Dirichlet concentration of the stored accuracies")] = "0.1",
    repeats: Annotated[
        int, typer.Option(help="timed iterations of the reference per stage, and timed batches of our engine")
    ] = 5,
) -> None:
    """Measure, compare and print."""
    torch.set_num_threads(1)
    settings = Settings.from_run_config({}).inversion
    batches = -(-settings.images // settings.batch_size)
    options = {**DEMO_MODEL, "mlp_ratio": 2, "num_classes": 10}
    bench = Bench(Case("demo", "vit_tiny_patch16_224", options, settings.batch_size, 10))
    reference = batches * schedule([stage_seconds(bench, stage, repeats) for stage in range(5)])
    ours = batches * statistics.median(batch_seconds(bench, settings) for _ in range(repeats))
    rows = [row for row in read(ROOT / "benchmarks/results/accuracy-mnist-5k.jsonl") if row["method"] == "fedmitr"]
    found = {
        **accuracies(rows, skew),
        "seconds": round(ours, 1),
        "reference_seconds_smi": round(reference, 1),
        "ratio": round(reference / ours, 1),
        "hardware": hardware(),
    }
    print(json.dumps(found))


def stage_seconds(bench: Bench, stage: int, repeats: int) -> float:
    """Return the median CPU seconds of one iteration of the plain reference."""
    step = bench.reference(stage)
    step()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def batch_seconds(bench: Bench, settings: InversionSettings) -> float:
    """Return the CPU seconds of one batch with the default settings."""
    start = time.process_time()
    invert(
        InversionTask(bench.ensemble(), bench.grid, settings), bench.labels, generator=torch.Generator().manual_seed(0)
    )
    return time.process_time() - start


def accuracies(rows: list[Row], skew: str) -> dict[str, float | int | None]:
    """Return the mean accuracies of both in percent, over the partition seeds that both have from the same code."""
    here = [row for row in rows if row["skew"] == skew and row["clients"] == 10]
    default, smi = ([row for row in here if row["changes"] == changes] for changes in ({}, SMI))
    runs = {(row["seed"], row["code"]) for row in default} & {(row["seed"], row["code"]) for row in smi}
    if not runs:
        return {"accuracy": None, "accuracy_smi": None, "seeds": 0}
    means = [mean_of([row for row in part if (row["seed"], row["code"]) in runs], "fedmitr") for part in (default, smi)]
    return {"accuracy": means[0], "accuracy_smi": means[1], "seeds": len({seed for seed, _ in runs})}


if __name__ == "__main__":
    typer.run(main)
