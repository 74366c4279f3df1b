"""A finished run in seconds: a tiny pipeline on digits, written as the ServerApp writes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from fedmitr_flwr.data import load_source
from fedmitr_flwr.federation.prepare import Federation, describe_run
from fedmitr_flwr.federation.quorum import ClientCounts
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.moments import feature_moments
from fedmitr_flwr.pipeline.inputs import PipelineInputs, Upload
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.results.write import write_results
from fedmitr_flwr.runs.directory import CONFIG, EVENTS, RunDirectory
from fedmitr_flwr.runs.jsonl import JsonLines
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.runs.snapshots import Keeper
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.settings.choices import MOMENT_METHODS
from fedmitr_flwr.training.initial import initial_state
from fedmitr_flwr.training.local import train_local

SETTINGS = Settings.from_run_config(
    {
        "data.source": "digits",
        "model.init": "seeded",
        "model.options": "patch_size=2,embed_dim=32,depth=2,num_heads=2",
        "train.min-steps": 40,
        "train.learning-rate": 3e-3,
        "inversion.images": 20,
        "inversion.batch-size": 10,
        "inversion.iterations": 6,
        "inversion.stops": "2,4",
        "inversion.fractions": "0.3,0.3",
        "distill.steps": 20,
        "distill.batch-size": 16,
        "distill.noise": 1.0,
        "generator.rounds": 3,
        "generator.batch-size": 8,
        "generator.iterations": 3,
        "generator.latent": 8,
        "generator.width": 4,
    }
)


def make_run(folder: Path, name: str, *, listening: bool = True, **changes: str | int | float | bool) -> Path:
    """Run two clients through the pipeline and write all results; a third one's upload was refused."""
    moments = {"train.share-moments": changes.get("run.method") in MOMENT_METHODS}
    settings = SETTINGS.replace(**{"run.output": str(folder), "run.name": name, **moments, **changes})
    source = load_source(settings.data)
    device = torch.device("cpu")
    held_out = None if settings.run.evaluate_on == "none" else source.test
    federation = Federation(source.spec, held_out, device)
    with RunDirectory.create(str(folder), name) as run:
        run.write_json(CONFIG, describe_run(settings, federation))
        keeper = Keeper()
        observer = Observer(JsonLines(run.path / EVENTS), keeper) if listening else Observer()
        initial = initial_state(settings, source.spec)
        clients = []
        observer.client("asked", count=3)
        for number, classes in enumerate((range(6), range(4, 9))):
            rows = np.flatnonzero(np.isin(source.train.labels, list(classes)))[:200]
            model = build_model(settings.model, source.spec)
            model.load_state_dict(initial)
            images, shared = source.train.subset(rows), None
            if settings.train.share_moments:
                shared = feature_moments(model, images, source.spec, batch_size=32, device=device)
            result = train_local(model, images, source.spec, settings.train, seed=0, device=device)
            clients.append(Upload(model.state_dict(), result.num_examples, None, moments=shared))
            observer.client(
                "accepted", client=f"<b>site {number}</b>", num_examples=result.num_examples, accuracy=result.accuracy
            )
        observer.client("refused", client="node 7", reason="head.weight holds NaN or Inf")
        method = METHODS[settings.run.method]
        settings = method.resolve(settings)
        out = method(PipelineInputs(settings, source.spec, clients, initial, settings.run.seed, observer=observer))
        counts = ClientCounts(asked=3, accepted=2, refused=1)
        write_results(run, settings, federation, out, counts, observer, keeper if listening else None)
        observer.close()
    return run.path


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
