"""Measure `ensemble.outlier-guard` with two bad clients of ten, and with none.

    python -m benchmarks.outliers --seeds 31 --split test --results benchmarks/results/outliers.jsonl

The first two clients of a partition are of one of three kinds:

- ``clean``: honest.
- ``flipped``: trained on flipped labels, c instead of 9 - c.
- ``noised``: with Gaussian noise added to their weights, of the standard deviation of each tensor.

All other settings are the defaults, except where an option changes them. `--ensemble-only` omits the global model.
Everything runs in one thread.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol

import torch
import typer

from benchmarks.federation import Federation, train_federation
from fedmitr_flwr.data import partition_indices
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.inputs import Upload
from fedmitr_flwr.pipeline.methods.fedmitr import run_pipeline
from fedmitr_flwr.pipeline.steps import make_ensemble
from fedmitr_flwr.results.evaluate import evaluate
from fedmitr_flwr.runs.observer import Observer, Value
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.training.local import train_local

BAD = (0, 1)
CPU = torch.device("cpu")


def main(
    seeds: Annotated[str, typer.Option(help="partition seeds, separated by commas")] = "31,32,33",
    clients: Annotated[int, typer.Option(help="number of clients K")] = 10,
    guard: Annotated[float, typer.Option(help="value of ensemble.outlier-guard that is compared with 0")] = 0.5,
    steps: Annotated[int | None, typer.Option(help="value of distill.steps; default: the setting's own")] = None,
    noise: Annotated[float | None, typer.Option(help="value of distill.noise; default: the setting's own")] = None,
    split: Annotated[str, typer.Option(help="split to measure on: validation or test")] = "validation",
    ensemble_only: Annotated[bool, typer.Option(help="measure only the ensemble, not the global model")] = False,
    cache: Annotated[Path, typer.Option(help="folder for trained uploads")] = Path("outputs/uploads-cache"),
    results: Annotated[Path | None, typer.Option(help="JSON lines file to append to")] = None,
) -> None:
    """Print one JSON line per partition, kind of clients and value of the guard."""
    torch.set_num_threads(1)
    for seed in (int(text) for text in seeds.split(",")):
        changes = {"distill.steps": steps, "distill.noise": noise}
        given = {key: value for key, value in changes.items() if value is not None}
        settings = Settings().replace(**{"partition.seed": seed, "ensemble.outlier-guard": 0.0, **given})
        federation = train_federation(settings, clients, cache)
        flipped = {number: _flipped(settings, federation, clients, number) for number in BAD}
        noised = {number: _noised(federation.clients[number], number) for number in BAD}
        for kind, bad in (("clean", {}), ("flipped", flipped), ("noised", noised)):
            uploads = [bad.get(number, client) for number, client in enumerate(federation.clients)]
            measure = partial(_ensemble_alone if ensemble_only else _accuracies, split=split)
            for row in _compared(settings, replace(federation, clients=uploads), guard, measure):
                line = json.dumps({"seed": seed, "clients": kind, "split": split, **row})
                print(line, flush=True)
                if results is not None:
                    with results.open("a") as file:
                        file.write(line + "\n")


class Measure(Protocol):
    """A function that measures the models from a federation's uploads."""

    def __call__(self, settings: Settings, federation: Federation) -> dict[str, float]:
        """Return accuracies in 0..1 by name."""


def _compared(settings: Settings, federation: Federation, guard: float, measure: Measure) -> list[dict[str, object]]:
    """Return results without and with the guard; if the guard changes no weight, one run is used for both."""
    guarded = settings.replace(**{"ensemble.outlier-guard": guard})
    heard = Heard()
    start = time.process_time()
    plain, _ = make_ensemble(federation.inputs(settings))
    between = time.process_time()
    judged, _ = make_ensemble(federation.inputs(guarded, observer=heard))
    cost = time.process_time() - between - (between - start)
    without = measure(settings, federation)
    same = torch.equal(plain.weights, judged.weights)
    found = without if same else measure(guarded, federation)
    examples = [client.num_examples for client in federation.clients]
    return [
        {"guard": 0.0, **without, "examples": examples},
        {"guard": guard, **found, **heard.said, "guard_cpu_seconds": round(cost, 1), "same_weights": same},
    ]


class Heard(Observer):
    """An observer that stores what the guard reports."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, Value] = {}

    def event(self, stage: str, **values: Value) -> None:
        self.said.update(values)


def _accuracies(settings: Settings, federation: Federation, *, split: str) -> dict[str, float]:
    result = run_pipeline(federation.inputs(settings))
    images = getattr(federation.source, split)
    found = evaluate(result, images, federation.spec, settings.model, CPU).accuracy()
    return {name: round(found[name], 4) for name in ("ensemble", "global")}


def _ensemble_alone(settings: Settings, federation: Federation, *, split: str) -> dict[str, float]:
    ensemble, _ = make_ensemble(federation.inputs(settings))
    images = getattr(federation.source, split)
    grid = PatchGrid.of(ensemble.teachers[0], federation.spec)
    right = 0
    for rows in torch.arange(len(images)).split(256):
        patches = grid.to_patches(federation.spec.normalise(images.images(rows)))
        right += int((ensemble(patches).probabilities.argmax(1) == torch.from_numpy(images.labels)[rows]).sum())
    return {"ensemble": round(right / len(images), 4)}


def _flipped(settings: Settings, federation: Federation, clients: int, number: int) -> Upload:
    """Return the client of this number, trained on flipped labels."""
    rows = [rows for rows in partition_indices(federation.source.train, settings.partition, clients) if len(rows)]
    images = federation.source.train.subset(rows[number])
    images = replace(images, labels=federation.spec.num_classes - 1 - images.labels)
    model = build_model(settings.model, federation.spec)
    model.load_state_dict(federation.initial)
    result = train_local(model, images, federation.spec, settings.train, seed=settings.run.seed + number, device=CPU)
    return Upload(model.state_dict(), result.num_examples, result.histogram)


def _noised(client: Upload, seed: int) -> Upload:
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: value + value.std(correction=0) * torch.randn(value.shape, generator=generator)
        for name, value in client.state.items()
    }
    return replace(client, state=state)


if __name__ == "__main__":
    typer.run(main)
