"""Checks before a run and results after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.federation.prepare import Federation, choose_device, describe_run, prepare
from fedmitr_flwr.federation.quorum import ClientCounts
from fedmitr_flwr.results.evaluate import Evaluation
from fedmitr_flwr.results.write import accuracy_table, make_metrics
from fedmitr_flwr.runs.directory import RunDirectory
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.runs.process_memory import peak_rss_mb
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError

SPEC = ImageSpec(("cat", "dog"), 1, 8, (0.5,), (0.5,))
EVALUATION = Evaluation(
    local=(0.25, 0.75),
    fedavg=0.6,
    ensemble=0.9,
    global_model=0.8,
    per_class={"fedavg": (0.6, 0.6), "ensemble": (0.9, 0.9), "global": (0.7, None)},
    confusion=((7, 3), (0, 0)),
    num_images=10,
)


def test_the_metrics_have_exactly_the_promised_keys() -> None:
    observer = Observer()
    observer.seconds.update({"clients": 1.23456, "invert": 2.0, "something": 9.0})
    metrics = make_metrics(
        EVALUATION, ClientCounts(asked=5, accepted=2, refused=1, failed=1, empty=1), observer, 0, 1.23456
    )
    peak = metrics.pop("peak_rss_mb")
    assert isinstance(peak, float)
    assert 50 < peak <= peak_rss_mb() + 1
    assert metrics == {
        "accuracy": {"local_mean": 0.5, "fedavg": 0.6, "ensemble": 0.9, "global": 0.8},
        "metrics": {},
        "per_class": {"global": (0.7, None)},
        "clients": {"asked": 5, "accepted": 2, "refused": 1, "failed": 1, "empty": 1},
        "seconds": {"clients": 1.235, "collect": 0, "invert": 2, "relabel": 0, "distill": 0, "evaluate": 0},
        "upload_mb": 1.23456,
        "memory_budget_mb": None,
    }


def test_without_an_evaluation_the_accuracies_are_null(tmp_path: Path) -> None:
    metrics = make_metrics(None, ClientCounts(asked=1), Observer())
    assert metrics["accuracy"] == dict.fromkeys(["local_mean", "fedavg", "ensemble", "global"])
    assert metrics["per_class"] == {"global": None}
    RunDirectory.create(str(tmp_path), "a").write_json("metrics.json", metrics)


def test_the_table_shows_all_four_accuracies() -> None:
    assert accuracy_table(EVALUATION, "test") == [
        "Accuracy on 10 test images",
        "    local models, mean  0.5000",
        "    one-shot FedAvg     0.6000",
        "    ensemble            0.9000",
        "    global model        0.8000",
    ]


def test_the_description_holds_what_it_takes_to_run_again(tmp_path: Path) -> None:
    settings = Settings().replace(**{"run.seed": 7, "partition.seed": 8, "data.split-seed": 9})
    config = describe_run(settings, Federation(SPEC, None, torch.device("cpu")))
    RunDirectory.create(str(tmp_path), "a").write_json("config.json", config)
    assert config["settings"] == settings.flat()
    assert config["seeds"] == {"run": 7, "partition": 8, "split": 9}
    versions = config["versions"]
    assert isinstance(versions, dict)
    assert {"python", "flwr", "torch", "timm", "ray", "numpy", "fedmitr-flwr"} <= versions.keys()


def test_the_device_must_be_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in {"cpu", "cuda"}
    with pytest.raises(SettingsError, match=r'run\.device = "cuda:99": this machine has \d+ GPUs'):
        choose_device("cuda:99")


@pytest.mark.parametrize(
    ("changes", "clients", "message"),
    [
        ({"data.classes": 11}, 3, r"data\.classes = 11"),
        ({"model.options": "patch_size=3,embed_dim=32,depth=1,num_heads=2"}, 3, r"model\.options|patch"),
        ({}, 2000, r"2000"),
    ],
)
def test_settings_that_cannot_work_with_the_data_are_refused_before_a_client_starts(
    changes: dict[str, RunConfigValue], clients: int, message: str
) -> None:
    small: dict[str, RunConfigValue] = {
        "data.source": "digits",
        "model.options": "patch_size=4,embed_dim=32,depth=1,num_heads=2",
    }
    with pytest.raises(SettingsError, match=message):
        prepare(Settings().replace(**{**small, **changes}), clients)


def test_what_is_held_out_follows_the_settings() -> None:
    small: dict[str, RunConfigValue] = {
        "data.source": "digits",
        "model.options": "patch_size=4,embed_dim=32,depth=1,num_heads=2",
    }
    sizes = {}
    for split in ("test", "validation", "none"):
        federation = prepare(Settings().replace(**{**small, "run.evaluate-on": split}), None)
        sizes[split] = None if federation.held_out is None else len(federation.held_out)
        assert federation.spec.num_classes == 10
    assert sizes["none"] is None
    assert sizes["test"] != sizes["validation"]
