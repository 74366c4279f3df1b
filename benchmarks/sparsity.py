"""Compare the time of sparse and dense inversion of the same images with the default settings.

    python -m benchmarks.sparsity

Sparse and dense inversion alternate. The last line of the output is JSON: the seconds of each repetition, and `ratio`,
sparse / dense (medians).
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.federation import train_federation
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.inputs import StageContext
from fedmitr_flwr.pipeline.steps import invert_all, make_ensemble
from fedmitr_flwr.settings import Settings


def main(
    repeats: Annotated[int, typer.Option(help="repetitions of sparse and of dense inversion")] = 3,
    images: Annotated[int, typer.Option(help="number of synthetic images; 0: inversion.images")] = 0,
    clients: Annotated[int, typer.Option(help="number of clients K")] = 10,
    cache: Annotated[Path, typer.Option(help="folder for trained uploads")] = Path("outputs/uploads-cache"),
) -> None:
    """Invert the demo's ensemble, alternating sparse and dense inversion."""
    sparse = Settings() if images == 0 else Settings().replace(**{"inversion.images": images})
    dense = sparse.replace(**{"inversion.stops": "", "inversion.fractions": "", "density.rule": "quantile"})
    federation = train_federation(sparse, clients, cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ensemble, classes = make_ensemble(federation.inputs(sparse, device=device))
    grid = PatchGrid.of(ensemble.teachers[0], federation.spec)
    seconds: dict[str, list[float]] = {"sparse": [], "dense": []}
    for _ in range(repeats):
        for name, settings in (("sparse", sparse), ("dense", dense)):
            start = time.perf_counter()
            context = StageContext(ensemble, grid, settings)
            invert_all(context, classes, federation.inputs(settings, seed=0, device=device))
            seconds[name].append(round(time.perf_counter() - start, 2))
    ratio = statistics.median(seconds["sparse"]) / statistics.median(seconds["dense"])
    print(json.dumps({**seconds, "threads": torch.get_num_threads(), "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    typer.run(main)
