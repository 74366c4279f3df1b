"""Teachers that contradict all others lose their say; honest ones that know other classes keep theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmitr_flwr.data import load_source
from fedmitr_flwr.ensemble.trust import known_classes, trust_by_opinion, trust_by_weights
from fedmitr_flwr.ensemble.weighting import class_weights
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.pipeline.inputs import PipelineInputs, Upload
from fedmitr_flwr.pipeline.outliers import LEAST_TRUST
from fedmitr_flwr.pipeline.steps import make_ensemble
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.training.initial import initial_state
from fedmitr_flwr.training.local import train_local

CPU = torch.device("cpu")
SETTINGS = Settings().replace(
    **{
        "data.source": "digits",
        "model.init": "seeded",
        "model.options": "patch_size=2,embed_dim=32,depth=2,num_heads=2",
        "train.min-steps": 120,
        "train.learning-rate": 3e-3,
        "inversion.iterations": 20,
        "inversion.stops": "5,10",
        "inversion.fractions": "0.3,0.3",
        "ensemble.outlier-guard": 0.5,
    }
)
SOURCE = load_source(SETTINGS.data)
# Each digit is known to three of the clients, and no two clients know the same ones.
CLASSES = [[(2 * number + step) % 10 for step in range(6)] for number in range(5)]


def trained(number: int, flipped: bool = False) -> Upload:
    rows = np.flatnonzero(np.isin(SOURCE.train.labels, CLASSES[number]))[number::5]
    images = SOURCE.train.subset(rows)
    if flipped:
        images = replace(images, labels=9 - images.labels)
    model = build_model(SETTINGS.model, SOURCE.spec)
    model.load_state_dict(initial_state(SETTINGS, SOURCE.spec))
    result = train_local(model, images, SOURCE.spec, SETTINGS.train, seed=number, device=CPU)
    return Upload(model.state_dict(), result.num_examples, result.histogram)


@pytest.fixture(scope="module")
def honest() -> list[Upload]:
    return [trained(number) for number in range(5)]


def noised(client: Upload) -> Upload:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: value + 2 * value.std() * torch.randn(value.shape, generator=generator)
        for name, value in client.state.items()
    }
    return replace(client, state=state)


def weights(clients: list[Upload], guard: float = 0.5) -> Tensor:
    settings = SETTINGS.replace(**{"ensemble.outlier-guard": guard})
    initial = initial_state(settings, SOURCE.spec)
    return make_ensemble(PipelineInputs(settings, SOURCE.spec, clients, initial))[0].weights


def silent(rows: Tensor) -> list[int]:
    return (rows.sum(1) < 0.02 * rows.sum()).nonzero().squeeze(1).tolist()


def known(share: list[list[float]]) -> Tensor:
    return torch.tensor(share, dtype=torch.float64)


def rankings(classes: list[list[int]], contrary: tuple[int, ...] = (), num_classes: int = 3) -> tuple[Tensor, Tensor]:
    """What teachers say who know some classes each, and their evidence; contrary ones turn the truth round."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(200, num_classes, generator=generator, dtype=torch.float64)
    said, evidence = [], torch.zeros(len(classes), num_classes, dtype=torch.float64)
    for k, own in enumerate(classes):
        noise = torch.randn(200, num_classes, generator=generator, dtype=torch.float64)
        said.append((-truth if k in contrary else truth) + 0.5 * noise)
        evidence[k, own] = 10.0
    stacked = torch.stack(said)
    stacked = stacked - stacked.mean(1, keepdim=True)
    return stacked / stacked.std(1, keepdim=True), evidence


def test_honest_teachers_that_know_different_classes_keep_all_their_weight(honest: list[Upload]) -> None:
    assert torch.equal(weights(honest), weights(honest, guard=0.0))


def test_a_teacher_of_flipped_labels_loses_its_say(honest: list[Upload]) -> None:
    assert silent(weights([*honest[:2], trained(2, flipped=True), *honest[3:]])) == [2]


def test_a_teacher_of_noise_loses_its_say(honest: list[Upload]) -> None:
    assert silent(weights([*honest[:4], noised(honest[4])])) == [4]


def test_a_class_counts_as_known_from_a_twentieth_of_the_examples_on() -> None:
    assert known_classes(torch.tensor([[94.0, 6.0, 0.0], [99.0, 1.0, 0.0]])).tolist() == [
        [True, True, False],
        [True, False, False],
    ]


def test_one_shared_class_is_enough_to_be_judged_and_none_is_not() -> None:
    said, evidence = rankings([[0], [0], [0], [0], [1]], contrary=(3, 4))
    agreement, trust = trust_by_opinion(said, evidence, 0.5)
    assert agreement.isnan().tolist() == [False] * 4 + [True]
    assert trust.tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]


def test_of_two_who_contradict_each_other_the_one_with_other_support_is_believed() -> None:
    said, evidence = rankings([[0, 1], [0], [1, 2], [1, 2], [2]], contrary=(1,))
    assert trust_by_opinion(said, evidence, 0.5)[1].tolist() == [1.0, 0.0, 1.0, 1.0, 1.0]


def test_a_minority_that_agrees_with_itself_does_not_pull_honest_teachers_down() -> None:
    said, evidence = rankings([[0, 1, 2]] * 7, contrary=(0, 1))
    assert trust_by_opinion(said, evidence, 0.5)[1].tolist() == [0.0, 0.0, *[1.0] * 5]


def test_two_who_contradict_each_other_are_both_heard() -> None:
    said, evidence = rankings([[0, 1], [0, 1]], contrary=(0,))
    assert trust_by_opinion(said, evidence, 0.5)[1].tolist() == [1.0, 1.0]


def test_less_agreement_means_less_say_and_not_none() -> None:
    said, evidence = rankings([[0, 1, 2]] * 6)
    generator = torch.Generator().manual_seed(4)
    blurred = said[0] + 3.0 * torch.randn(said[0].shape, generator=generator, dtype=torch.float64)
    said[0] = (blurred - blurred.mean(0)) / blurred.std(0)
    trust = trust_by_opinion(said, evidence, 0.5)[1]
    assert 0.05 < float(trust[0]) < 0.95
    assert trust[1:].tolist() == [1.0] * 5


def test_weights_that_no_training_leads_to_are_not_heard(honest: list[Upload]) -> None:
    initial = initial_state(SETTINGS, SOURCE.spec)
    models = []
    for client in [*honest[:4], noised(honest[4])]:
        model = build_model(SETTINGS.model, SOURCE.spec)
        model.load_state_dict(client.state)
        models.append(model)
    trust = trust_by_weights(models, initial, 0.5)
    assert trust[:4].tolist() == [1.0] * 4
    assert float(trust[4]) < LEAST_TRUST


def test_a_single_client_is_believed(honest: list[Upload]) -> None:
    assert torch.equal(weights(honest[:1]), weights(honest[:1], guard=0.0))


def test_trust_lowers_weights_and_leaves_a_class_that_nobody_knows_to_the_trusted() -> None:
    found = class_weights(known([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]]), 0.5, torch.tensor([1.0, 0.5, 0.0]))
    assert torch.allclose(found, torch.tensor([[2 / 3, 2 / 3], [1 / 3, 1 / 3], [0.0, 0.0]]))
