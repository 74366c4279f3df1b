"""`run.method` lda and ridge: clients, messages, head and results together, without Flower's processes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from torch import Tensor

from fedmitr_flwr.data import load_source, partition_indices
from fedmitr_flwr.federation import quorum
from fedmitr_flwr.federation.exchange import windowed_grid
from fedmitr_flwr.federation.prepare import Federation, describe_run
from fedmitr_flwr.federation.strategy import FedMITR
from fedmitr_flwr.federation.uploads.records import decode_trusted, encode_state
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.moments import Moments
from fedmitr_flwr.models.vit import forward_images
from fedmitr_flwr.pipeline.inputs import PipelineInputs, Upload
from fedmitr_flwr.pipeline.methods import METHODS, method_of
from fedmitr_flwr.pipeline.shared_moments import pooled_moments
from fedmitr_flwr.results.write import write_results
from fedmitr_flwr.runs.directory import CONFIG, RunDirectory
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError
from fedmitr_flwr.training.initial import initial_state
from tests.unit.federation.fake_federation import FakeGrid, honest

CPU = torch.device("cpu")
CLIENTS = 10  # as in `honest`
SETTINGS = Settings().replace(
    **{
        "data.source": "digits",
        "data.classes": 6,
        "partition.alpha": 0.05,
        "model.init": "seeded",
        "model.options": "patch_size=2,embed_dim=32,depth=2,num_heads=2",
        "train.epochs": 0,
        "train.min-steps": 0,
        "train.share-moments": True,
        "run.method": "lda",
        "run.min-fraction": 0.0,
        "run.wait-nodes-seconds": 0.0,
    }
)
SOURCE = load_source(SETTINGS.data)
INITIAL = initial_state(SETTINGS, SOURCE.spec)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quorum, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(windowed_grid, "_NETWORK", 0.001)
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower sets them in its processes
        monkeypatch.setattr(TaskIdentity, name, 1)


def plain_features(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of training images under the common initialisation, by timm alone."""
    model = build_model(SETTINGS.model, SOURCE.spec).eval()
    model.load_state_dict(INITIAL)
    images = SOURCE.train.subset(rows)
    with torch.no_grad():
        x = SOURCE.spec.normalise(images.images(np.arange(len(images))))
        features = model.forward_head(model.forward_features(x), pre_logits=True)
    return features.double().numpy(), images.labels


def run_method(folder: Path, method: str, name: str = "run", **changes: RunConfigValue) -> dict[str, Tensor]:
    settings = SETTINGS.replace(**{"run.method": method, "run.output": str(folder), **changes})
    with RunDirectory.create(str(folder), name) as run:
        run.write_json(CONFIG, describe_run(settings, Federation(SOURCE.spec, SOURCE.test, CPU)))
        observer = Observer()
        strategy = FedMITR(settings, SOURCE.spec, run, device=CPU, observer=observer, pipeline=method_of(settings))
        result = strategy.start(FakeGrid([honest] * CLIENTS), encode_state(INITIAL), num_rounds=1)
        assert strategy.outcome is not None
        outcome = strategy.outcome
        federation = Federation(SOURCE.spec, SOURCE.test, CPU)
        write_results(run, settings, federation, outcome.result, outcome.clients, observer)
    return decode_trusted(result.arrays)


def centred(logits: np.ndarray) -> np.ndarray:
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("method", ["lda", "ridge"])
def test_the_global_model_is_the_initialisation_with_the_centralised_head(tmp_path: Path, method: str) -> None:
    state = run_method(tmp_path, method)
    head = ("head.weight", "head.bias")
    assert all(torch.equal(value, INITIAL[name]) for name, value in state.items() if name not in head)
    rows = np.concatenate(partition_indices(SOURCE.train, SETTINGS.partition, CLIENTS))
    assert len(np.unique(rows)) == len(rows) == len(SOURCE.train)
    x, y = plain_features(rows)
    if method == "lda":
        shrinkage = SETTINGS.moments.shrinkage
        central = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, store_covariance=True).fit(x, y)
        # scikit-learn's covariance is divided by n, ours by n - C
        weight = central.means_ @ np.linalg.inv(central.covariance_) * (len(y) - 6) / len(y)
        expected = x @ weight.T - 0.5 * (weight * central.means_).sum(1) + np.log(central.priors_)
    else:
        alpha = SETTINGS.moments.ridge * np.trace(np.cov(x.T, ddof=0)) * len(y) / x.shape[1]
        expected = Ridge(alpha=alpha, solver="cholesky").fit(x, np.eye(6)[y]).predict(x)
    logits = x @ state["head.weight"].double().numpy().T + state["head.bias"].double().numpy()
    assert np.abs(centred(logits) - centred(expected)).max() <= 1e-5 * np.abs(centred(expected)).max()


def test_the_results_compare_the_model_with_the_uploads_and_say_how_it_was_made(tmp_path: Path) -> None:
    state = run_method(tmp_path, "lda", **{"train.min-steps": 3})
    run = tmp_path / "run"
    accuracy = json.loads((run / "metrics.json").read_text())["accuracy"]
    model = build_model(SETTINGS.model, SOURCE.spec).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        said = forward_images(model, SOURCE.spec.normalise(SOURCE.test.images(np.arange(len(SOURCE.test))))).logits
    assert accuracy["global"] == pytest.approx(float((said.argmax(1).numpy() == SOURCE.test.labels).mean()), abs=1e-3)
    assert accuracy["global"] > 0.8 > accuracy["ensemble"] > 0.0
    report, card = (run / "report.html").read_text(), (run / "model" / "README.md").read_text()
    assert "computed a linear discriminant with shrinkage 0.1 of the covariance from them" in report
    assert "computed a linear discriminant with shrinkage 0.1 of the covariance from them" in card
    assert "feature moments with the counts of each class" in card


def test_local_training_has_no_effect_on_the_model_and_moments_none_on_training(tmp_path: Path) -> None:
    untrained = run_method(tmp_path, "lda")
    trained = run_method(tmp_path, "lda", "trained", **{"train.min-steps": 3})
    assert all(torch.equal(value, trained[name]) for name, value in untrained.items())
    shared = run_method(tmp_path, "fedavg", "shared", **{"train.min-steps": 3})
    withheld = run_method(tmp_path, "fedavg", "withheld", **{"train.min-steps": 3, "train.share-moments": False})
    assert all(torch.equal(value, withheld[name]) for name, value in shared.items())


def test_further_rounds_keep_the_model(tmp_path: Path) -> None:
    settings = SETTINGS.replace(**{"run.output": str(tmp_path), "run.rounds": 2, "train.min-steps": 3})
    with RunDirectory.create(str(tmp_path), "rounds") as run:
        strategy = FedMITR(settings, SOURCE.spec, run, device=CPU, observer=Observer(), pipeline=METHODS["lda"])
        result = strategy.start(FakeGrid([honest] * CLIENTS), encode_state(INITIAL), num_rounds=2)
    once = run_method(tmp_path, "lda")
    assert all(torch.equal(value, once[name]) for name, value in decode_trusted(result.arrays).items())


def inputs(method: str = "lda", **changes: RunConfigValue) -> PipelineInputs:
    """Two clients; the second has the classes 3 and 4, nobody has a 5."""
    settings = SETTINGS.replace(**{"run.method": method, **changes})
    uploads = []
    for classes in ((0, 1, 2), (3, 4)):
        x, y = plain_features(np.flatnonzero(np.isin(SOURCE.train.labels, classes)))
        moments = Moments.of_features(torch.from_numpy(x).float(), torch.from_numpy(y), 6)
        uploads.append(Upload(INITIAL, len(y), None, moments=moments))
    return PipelineInputs(settings, SOURCE.spec, uploads, INITIAL)


@pytest.mark.parametrize("method", ["lda", "ridge"])
def test_a_class_that_no_client_has_is_named_and_never_predicted(method: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fedmitr"):
        result = METHODS[method](inputs(method))
    assert "no client has images of 1 classes, which are never predicted: 5" in caplog.text
    model = build_model(SETTINGS.model, SOURCE.spec).eval()
    model.load_state_dict(result.state)
    with torch.no_grad():
        images = SOURCE.spec.normalise(SOURCE.test.images(np.arange(len(SOURCE.test))))
        said = torch.cat([forward_images(model, scale * images).logits for scale in (1.0, -50.0)]).argmax(1)
    assert sorted(set(said.tolist())) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("method", "change"),
    [("lda", {"moments.shrinkage": 0.9}), ("lda", {"moments.prior": "equal"}), ("ridge", {"moments.ridge": 5.0})],
)
def test_each_setting_changes_the_head(method: str, change: dict[str, RunConfigValue]) -> None:
    heads = [METHODS[method](inputs(method, **more)).state["head.bias"] for more in ({}, change)]
    assert not torch.equal(*heads)


def test_a_client_that_claims_far_more_images_than_the_others_does_not_decide() -> None:
    given = inputs()
    first = given.uploads[0].moments
    assert first is not None
    million = 1_000_000
    claimed = Moments(million * first.counts.flip(0), million * first.sums.flip(0), million * first.products)
    hostile = Upload(INITIAL, int(claimed.counts.sum()), None, moments=claimed)
    others = [given.uploads[0], given.uploads[1]]
    pooled = pooled_moments(replace(given, uploads=[*others, hostile]))
    honest_images = sum(upload.num_examples for upload in others)
    assert float(pooled.counts.sum()) <= honest_images + 3 * max(upload.num_examples for upload in others)


@pytest.mark.parametrize("method", ["lda", "ridge"])
def test_moments_that_a_client_withheld_are_an_error(method: str) -> None:
    given = inputs(method)
    without = replace(given, uploads=[given.uploads[0], replace(given.uploads[1], moments=None)])
    with pytest.raises(ValueError, match=r"train\.share-moments = true needs the feature moments of every client"):
        METHODS[method](without)


def test_a_model_with_two_heads_is_refused() -> None:
    given = inputs(**{"model.name": "deit_tiny_distilled_patch16_224"})
    with pytest.raises(SettingsError, match="has two classifier heads"):
        METHODS["lda"](given)
