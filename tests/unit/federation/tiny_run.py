"""A complete run of the app in this process, without Flower's processes: real clients, real stages, tiny sizes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

import server_app.app as server_module
from fedmitr_flwr.federation import code_digest, prepare, strategy
from fedmitr_flwr.federation.exchange import windowed_grid
from fedmitr_flwr.results import write as results
from fedmitr_flwr.settings import RunConfigValue, Settings
from fedmitr_flwr.settings.recipes import KEYS, UNNAMED
from fedmitr_flwr.stages.stage_costs import StageCost
from fedmitr_flwr.training.client import train_client
from tests.unit.federation.fake_federation import FakeGrid, honest, install

SETTINGS: dict[str, RunConfigValue] = {
    "data.source": "digits",
    "partition.alpha": 10.0,
    "model.options": "patch_size=4,embed_dim=8,depth=1,num_heads=1",
    "model.init": "seeded",
    "train.min-steps": 1,
    "train.epochs": 1,
    "inversion.images": 4,
    "inversion.batch-size": 2,
    "inversion.iterations": 4,
    "inversion.stops": "2",
    "inversion.fractions": "0.3",
    "distill.steps": 4,
    "distill.batch-size": 4,
    "distill.noise": 1.0,
    "run.checkpoint-seconds": 0.0,
    "run.min-clients": 3,
    "run.wait-nodes-seconds": 0.0,
    "run.deadline-seconds": 60.0,
    "run.evaluate-on": "none",
}


def install_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the fakes in place of Flower's processes. The clients really train; what no test here reads is left out."""
    install(monkeypatch)
    monkeypatch.setattr("client_app.app.train_client", train_client)
    monkeypatch.setattr(windowed_grid, "_NETWORK", 0.001)
    monkeypatch.setattr(results, "write_report", lambda *_: None)
    digest = code_digest.code_digest()
    for module in (code_digest, prepare, strategy, results):
        monkeypatch.setattr(module, "code_digest", lambda: digest)
    monkeypatch.setattr("fedmitr_flwr.pipeline.diagnostics.stage_costs", lambda *_: [StageCost(1, 1, 1, 1, 1.0, 1.0)])
    monkeypatch.setattr("fedmitr_flwr.results.figures.save_synthetic", lambda *_: None)


def run_app(config: dict[str, RunConfigValue], clients: int = 3) -> None:
    """Run the ServerApp with the given run-config, to which Flower adds the defaults of pyproject.toml."""
    grid = FakeGrid([honest] * clients)
    defaults = {**Settings().flat(), **dict.fromkeys(KEYS, UNNAMED)}
    server_module.main(grid, Context(1, 1, {}, RecordDict(), {**defaults, **config}))


def resume(path: Path, **changes: RunConfigValue) -> None:
    """Resume a run."""
    run_app({"run.resume": str(path), **{key.replace("__", ".").replace("_", "-"): changes[key] for key in changes}})


def weights(path: Path) -> str:
    """Return a digest of the global model's tensors."""
    state = load_file(path / "model" / "model.safetensors")
    return hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()
