"""Hostile uploads in front of every method: averages and votes stay near what they are without the attacker."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmitr_flwr.pipeline.inputs import PipelineInputs, Upload
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.pipeline.safeguards import bounded_uploads, vote_warnings
from fedmitr_flwr.training.initial import initial_state
from tests.unit.pipeline.test_pipeline import SETTINGS, SOURCE, clients  # noqa: F401 - a fixture

QUICK = SETTINGS.replace(**{"run.method": "fedavg"})


@pytest.fixture
def inputs(clients) -> PipelineInputs:  # noqa: F811
    initial = initial_state(SETTINGS, SOURCE.spec)
    more = [boosted(upload, initial, factor) for factor in (1.0, 0.7, 1.4) for upload in clients]
    named = [replace(upload, name=f"site {number}") for number, upload in enumerate(more)]
    return PipelineInputs(QUICK, SOURCE.spec, named, initial)


def boosted(upload: Upload, initial: dict[str, torch.Tensor], factor: float, **changes: object) -> Upload:
    state = {
        name: value + (factor - 1) * (value - initial[name]) if value.is_floating_point() else value
        for name, value in upload.state.items()
    }
    return replace(upload, state=state, **changes)


def test_honest_inputs_are_the_same_object_and_nothing_is_said(inputs: PipelineInputs):
    assert bounded_uploads(inputs) == (inputs, ())
    assert bounded_uploads(inputs)[0] is inputs


def test_a_boosted_update_is_shortened_and_named(inputs: PipelineInputs):
    attacked = replace(inputs, uploads=[boosted(inputs.uploads[0], inputs.initial, -100.0), *inputs.uploads[1:]])
    result, honest = METHODS["fedavg"](attacked), METHODS["fedavg"](inputs)
    unbounded = METHODS["fedavg"](replace(attacked, settings=QUICK.replace(**{"run.update-limit": 0.0})))
    moved, without = (
        float((found.state["head.weight"] - honest.state["head.weight"]).norm()) for found in (result, unbounded)
    )
    assert moved < without / 10
    assert any("site 0" in text and "shortened" in text for text in result.warnings)


def test_it_can_be_left_out_instead(inputs: PipelineInputs):
    settings = QUICK.replace(**{"run.update-limit-action": "refuse"})
    attacked = replace(
        inputs, settings=settings, uploads=[boosted(inputs.uploads[0], inputs.initial, 50.0), *inputs.uploads[1:]]
    )
    bounded, warnings = bounded_uploads(attacked)
    assert [upload.name for upload in bounded.uploads] == [upload.name for upload in inputs.uploads[1:]]
    assert "left out" in warnings[0]


def test_a_claim_of_a_thousand_million_images_is_bounded_in_every_weighting_and_named(inputs: PipelineInputs):
    liar = replace(inputs.uploads[0], num_examples=10**9)
    attacked = replace(inputs, uploads=[liar, *inputs.uploads[1:]])
    share = attacked.num_examples / attacked.num_examples.sum()
    assert float(share[0]) < 0.5
    result = METHODS["fedavg"](attacked)
    assert any("site 0 claims 1,000,000,000 images" in text for text in result.warnings)


def test_a_client_with_most_of_the_weight_is_named(inputs: PipelineInputs):
    weights = torch.full((len(inputs.uploads), SOURCE.spec.num_classes), 0.1)
    weights[1, :] = 0.9
    assert any(text.startswith("site 1 has more than half of the ensemble") for text in vote_warnings(inputs, weights))
