"""Teachers that contradict all others lose their say; honest ones that know other classes keep theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmitr_flwr.data import load_source
from fedmitr_flwr.grid import PatchGrid
from fedmitr_flwr.models import build_model, initial_state
from fedmitr_flwr.outliers import examine, known_classes, outliers, standing
from fedmitr_flwr.pipeline import ClientModel, PipelineInputs, make_ensemble
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.training import train_local

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


def trained(number: int, flipped: bool = False) -> ClientModel:
    rows = np.flatnonzero(np.isin(SOURCE.train.labels, CLASSES[number]))[number::5]
    images = SOURCE.train.subset(rows)
    if flipped:
        images = replace(images, labels=9 - images.labels)
    model = build_model(SETTINGS.model, SOURCE.spec)
    model.load_state_dict(initial_state(SETTINGS, SOURCE.spec))
    result = train_local(model, images, SOURCE.spec, SETTINGS.train, seed=number, device=CPU)
    return ClientModel(model.state_dict(), result.num_examples, result.histogram)


@pytest.fixture(scope="module")
def honest() -> list[ClientModel]:
    return [trained(number) for number in range(5)]


def noised(client: ClientModel) -> ClientModel:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: value + 2 * value.std() * torch.randn(value.shape, generator=generator)
        for name, value in client.state.items()
    }
    return replace(client, state=state)


def weights(clients: list[ClientModel], guard: float = 0.5) -> Tensor:
    settings = SETTINGS.replace(**{"ensemble.outlier-guard": guard})
    initial = initial_state(settings, SOURCE.spec)
    return make_ensemble(PipelineInputs(settings, SOURCE.spec, clients, initial))[0].weights


def silent(rows: Tensor) -> list[int]:
    return (rows.sum(1) == 0).nonzero().squeeze(1).tolist()


def test_honest_teachers_that_know_different_classes_are_all_heard(honest: list[ClientModel]) -> None:
    assert torch.equal(weights(honest), weights(honest, guard=0.0))


def test_a_teacher_of_flipped_labels_loses_its_say(honest: list[ClientModel]) -> None:
    assert silent(weights([*honest[:2], trained(2, flipped=True), *honest[3:]])) == [2]


def test_a_teacher_of_noise_loses_its_say(honest: list[ClientModel]) -> None:
    assert silent(weights([*honest[:4], noised(honest[4])])) == [4]


def test_agreement_is_symmetric_repeats_and_is_high_among_honest_teachers(honest: list[ClientModel]) -> None:
    models = []
    for client in honest:
        model = build_model(SETTINGS.model, SOURCE.spec).eval()
        model.load_state_dict(client.state)
        models.append(model)
    known = torch.zeros(5, 10, dtype=torch.float64)
    for number, classes in enumerate(CLASSES):
        known[number, classes] = 1.0
    grid = PatchGrid.of(models[0], SOURCE.spec)
    first, second = (examine(models, known, grid, SETTINGS.inversion, seed=1) for _ in range(2))
    assert torch.equal(first.nan_to_num(), second.nan_to_num())
    assert torch.equal(first.nan_to_num(), first.T.nan_to_num())
    assert bool(first.diagonal().isnan().all())
    assert float(standing(first).min()) > 0.5


def test_a_class_counts_as_known_from_a_twentieth_of_the_examples_on() -> None:
    assert known_classes(torch.tensor([[94.0, 6.0, 0.0], [99.0, 1.0, 0.0]])).tolist() == [
        [True, True, False],
        [True, False, False],
    ]


def test_who_shares_classes_with_fewer_than_two_others_is_not_judged() -> None:
    nan = torch.nan
    agreement = torch.tensor(
        [[nan, 0.9, 0.8, nan], [0.9, nan, 0.9, -0.5], [0.8, 0.9, nan, nan], [nan, -0.5, nan, nan]], dtype=torch.float64
    )
    assert standing(agreement)[3].isnan()
    assert outliers(agreement, 0.5).tolist() == [False] * 4


def test_a_minority_that_contradicts_does_not_pull_an_honest_teacher_down() -> None:
    agreement = torch.full((7, 7), 0.9, dtype=torch.float64)
    agreement[:2, 2:] = agreement[2:, :2] = -0.1
    agreement[0, 1] = agreement[1, 0] = 1.0  # the two of them agree
    agreement.fill_diagonal_(torch.nan)
    assert outliers(agreement, 0.5).tolist() == [True, True, *[False] * 5]
