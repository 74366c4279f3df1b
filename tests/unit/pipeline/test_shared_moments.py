"""Feature moments beside weights: an expert in the ensemble and a start of the student, for every method."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedmitr_flwr.ensemble.moments import ABSENT
from fedmitr_flwr.federation.plan import plan_memory
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_images
from fedmitr_flwr.pipeline.inputs import PipelineInputs, Upload
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.pipeline.starts import student_start
from fedmitr_flwr.pipeline.steps import make_ensemble
from fedmitr_flwr.results.evaluate import evaluate
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError
from fedmitr_flwr.stages.distillation.pool import label_patches
from fedmitr_flwr.training.initial import initial_state
from tests.unit.pipeline.test_pipeline import CPU, SETTINGS, SOURCE, clients  # noqa: F401 - a fixture

INITIAL = initial_state(SETTINGS, SOURCE.spec)
IMAGES = SOURCE.validation


def inputs(uploads: Sequence[Upload], **changes: RunConfigValue) -> PipelineInputs:
    return PipelineInputs(SETTINGS.replace(**changes), SOURCE.spec, uploads, INITIAL)


def logits(state: dict[str, Tensor]) -> Tensor:
    model = build_model(SETTINGS.model, SOURCE.spec).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return forward_images(model, SOURCE.spec.normalise(IMAGES.images(range(len(IMAGES))))).logits


def discriminant(uploads: Sequence[Upload]) -> Tensor:
    """Logits of `run.method = lda`."""
    return logits(METHODS["lda"](inputs(uploads, **{"run.method": "lda"})).state)


def probabilities(uploads: Sequence[Upload], **changes: RunConfigValue) -> Tensor:
    made, _ = make_ensemble(inputs(uploads, **changes))
    patches = PatchGrid.of(made.teachers[0], SOURCE.spec).to_patches
    return made(patches(SOURCE.spec.normalise(IMAGES.images(range(len(IMAGES)))))).probabilities


@pytest.mark.parametrize("rule", ["probabilities", "logits", "sigmoids"])
@pytest.mark.parametrize("weight", [0.1, 0.4])
def test_the_ensemble_is_multiplied_by_the_discriminant_to_the_power_of_the_weight(
    clients: list[Upload],  # noqa: F811
    rule: str,
    weight: float,
) -> None:
    plain = probabilities(clients, **{"ensemble.combine": rule, "ensemble.moments-weight": 0.0})
    got = probabilities(clients, **{"ensemble.combine": rule, "ensemble.moments-weight": weight})
    factor = discriminant(clients)[:, :9].mul(weight).softmax(1)  # nobody has a 9
    expected = plain[:, :9] * factor
    assert torch.allclose(got[:, :9], expected / expected.sum(1, keepdim=True), atol=1e-4)
    assert bool((got[:, 9] < 1e-30).all())


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_ensemble_is_multiplied_by_the_merged_model_to_the_power_of_the_weight(
    clients: list[Upload],  # noqa: F811
    weight: float,
) -> None:
    withheld: dict[str, RunConfigValue] = {"train.share-moments": False}
    plain = probabilities(clients, **withheld)
    got = probabilities(clients, **withheld, **{"ensemble.merged-weight": weight})
    merged = METHODS["head-aggregation"](inputs(clients, **withheld, **{"run.method": "head-aggregation"})).state
    expected = plain * logits(merged).mul(weight).softmax(1)
    assert torch.allclose(got, expected / expected.sum(1, keepdim=True), atol=1e-4)


def test_with_moments_the_expert_is_the_discriminant(clients: list[Upload]) -> None:  # noqa: F811
    both = probabilities(clients, **{"ensemble.merged-weight": 1.0})
    assert torch.equal(both, probabilities(clients))


def test_moments_are_used_only_if_clients_share_them_and_with_a_weight_of_one_tenth(
    clients: list[Upload],  # noqa: F811
) -> None:
    assert Settings().ensemble.moments_weight == 0.1
    assert Settings().expert == ""
    assert SETTINGS.expert == "moments"
    without = [replace(client, moments=None) for client in clients]
    withheld = probabilities(without, **{"train.share-moments": False})
    assert torch.equal(probabilities(clients, **{"train.share-moments": False}), withheld)
    assert torch.equal(probabilities(without, **{"ensemble.moments-weight": 0.0}), withheld)
    assert not torch.allclose(probabilities(clients), withheld, atol=1e-2)
    with pytest.raises(ValueError, match=r"train\.share-moments = true needs the feature moments of every client"):
        METHODS["fedmitr"](inputs([without[0], clients[1]]))


def test_the_evaluation_and_the_pool_use_the_same_distribution(clients: list[Upload]) -> None:  # noqa: F811
    result = METHODS["fedavg"](inputs(clients, **{"run.method": "fedavg", "ensemble.moments-weight": 0.4}))
    expected = probabilities(clients, **{"ensemble.moments-weight": 0.4})
    found = evaluate(result, IMAGES, SOURCE.spec, SETTINGS.model, CPU)
    right = expected.argmax(1) == torch.from_numpy(IMAGES.labels)
    assert found.ensemble == pytest.approx(float(right.float().mean()))
    assert len(found.local) == 2
    patches = PatchGrid.of(result.ensemble.teachers[0], SOURCE.spec).to_patches(
        SOURCE.spec.normalise(IMAGES.images(range(len(IMAGES))))
    )
    targets = label_patches(result.ensemble, patches, SETTINGS.distill)
    assert torch.allclose(targets.probabilities, expected, atol=1e-5)
    assert targets.features is not None
    assert targets.features.shape[1] == 2


def test_classes_of_which_no_client_has_images_are_not_inverted(
    clients: list[Upload],  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes: dict[str, RunConfigValue] = {"ensemble.weighting": "uniform", "distill.steps": 1}
    with caplog.at_level(logging.INFO, logger="fedmitr"):
        result = METHODS["fedmitr"](inputs(clients, **changes))
    assert result.synthetic is not None
    assert sorted(set(result.synthetic.labels.tolist())) == list(range(9))
    assert caplog.text.count("no client has images of 1 classes, which are never predicted: 9") == 1
    withheld = METHODS["fedmitr"](inputs(clients, **changes, **{"train.share-moments": False}))
    assert withheld.synthetic is not None
    assert sorted(set(withheld.synthetic.labels.tolist())) == list(range(10))


def test_the_student_can_start_from_the_initialisation_with_the_discriminant(clients: list[Upload]) -> None:  # noqa: F811
    for weight in (0.0, 0.25):
        given = inputs(clients, **{"distill.start": "moments", "ensemble.moments-weight": weight})
        state = student_start(given, make_ensemble(given)[0])
        assert all(torch.equal(state[name], INITIAL[name]) for name in INITIAL if not name.startswith("head."))
        assert torch.allclose(logits(state)[:, :9], (weight or 1.0) * discriminant(clients)[:, :9], atol=1e-3)
        assert float(state["head.bias"][9]) == ABSENT
    started = METHODS["random-images"](given)
    assert not torch.equal(started.state["head.weight"], state["head.weight"])


def test_a_start_from_moments_that_are_not_shared_is_refused() -> None:
    with pytest.raises(SettingsError, match=r'distill\.start = "moments": needs train\.share-moments = true'):
        Settings().replace(**{"distill.start": "moments"})
    Settings().replace(**{"distill.start": "moments", "train.share-moments": True})


def test_the_memory_plan_counts_the_further_model() -> None:
    settings = SETTINGS.replace(**{"run.memory-mb": 20_000, "model.options": "patch_size=2,embed_dim=384,depth=4"})
    teachers = [
        plan_memory(settings.replace(**{"ensemble.moments-weight": weight}), SOURCE.spec, 10, CPU).teachers
        for weight in (0.0, 0.1)
    ]
    assert teachers[1] == pytest.approx(1.1 * teachers[0], rel=0.01)


@pytest.mark.parametrize("method", ["fedmitr", "random-images", "dense"])
def test_the_card_names_the_moments_among_what_the_model_was_made_from(method: str) -> None:
    shared = SETTINGS.replace(**{"run.method": method})
    told = METHODS[method].server_part(shared)
    assert "the ensemble of uploads and a linear discriminant of the clients' feature moments" in told
    withheld = shared.replace(**{"train.share-moments": False})
    assert "moments" not in METHODS[method].server_part(withheld)
