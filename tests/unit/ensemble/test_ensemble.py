import pytest
import torch

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.ensemble.weighting import Knowledge, class_weights, competence, evidence
from tests.unit.tiny import CLASSES, plain_ensemble, tiny_ensemble, tiny_grid, tiny_vit

IMAGES = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(7))


def test_ensemble_equals_the_formula_class_by_class():
    ensemble, grid = tiny_ensemble(), tiny_grid()
    got = ensemble(grid.to_patches(IMAGES)).probabilities
    assert torch.allclose(got, plain_ensemble(ensemble, IMAGES), atol=1e-6)


def test_ensemble_on_a_subset_of_patches_equals_the_formula():
    ensemble, grid = tiny_ensemble(), tiny_grid()
    index = torch.tensor([[0, 3, 7], [1, 2, 15], [4, 5, 6], [8, 9, 10]])
    patches = grid.to_patches(IMAGES).gather(1, index[..., None].expand(-1, -1, 16))
    got = ensemble(patches, index).probabilities
    assert torch.allclose(got, plain_ensemble(ensemble, IMAGES, index), atol=1e-6)


def test_ensemble_outputs_are_distributions():
    got = tiny_ensemble()(tiny_grid().to_patches(IMAGES)).probabilities
    assert torch.allclose(got.sum(1), torch.ones(4), atol=1e-6)
    assert bool((got >= 0).all())


def test_attention_is_the_label_weighted_mean_over_teachers():
    ensemble, patches = tiny_ensemble(), tiny_grid().to_patches(IMAGES)
    labels = torch.tensor([0, 1, 2, 4])
    got = ensemble(patches, attention=True, labels=labels).attention
    alone = torch.stack(
        [Ensemble([t], torch.ones(1, CLASSES))(patches, attention=True).attention for t in ensemble.teachers]
    )
    expected = sum(ensemble.weights[k, labels][:, None] * alone[k] for k in range(3))
    assert got is not None
    assert torch.allclose(got, expected, atol=1e-6)


def test_a_teacher_without_weight_in_a_class_may_still_say_that_an_image_shows_it():
    weights = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.5], [0.0, 0.0, 1.0, 1.0, 0.5]])
    ensemble = Ensemble([tiny_vit(0), tiny_vit(1)], weights)
    got = ensemble(tiny_grid().to_patches(IMAGES)).probabilities
    first, second = (teacher(IMAGES).softmax(-1) for teacher in ensemble.teachers)
    total = torch.cat([first[:, :2], second[:, 2:4], (first[:, 4:] + second[:, 4:]) / 2], 1)
    assert torch.allclose(got, total / total.sum(1, keepdim=True), atol=1e-6)


def test_teachers_are_frozen():
    teacher = tiny_vit().train()
    Ensemble([teacher], torch.ones(1, CLASSES))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_weights_of_another_number_of_teachers_are_refused():
    with pytest.raises(ValueError, match=r"weights of shape \(2, 5\) do not fit 1 teachers"):
        Ensemble([tiny_vit()], torch.ones(2, CLASSES))


def test_drawn_teachers_are_those_that_know_the_classes_and_their_weights_sum_to_one():
    weights = torch.zeros(6, CLASSES)
    weights[:3, :2], weights[3:, 2:] = 1 / 3, 1 / 3
    ensemble = Ensemble([tiny_vit(k) for k in range(6)], weights)
    few = ensemble.draw(2, torch.tensor([0, 1, 0]), torch.Generator().manual_seed(0))
    places = [ensemble.teachers.index(teacher) for teacher in few.teachers]
    assert len(set(places)) == 2
    assert set(places) <= {0, 1, 2}
    assert torch.allclose(few.weights.sum(0), torch.ones(CLASSES))
    assert ensemble.draw(0, torch.tensor([0]), torch.Generator()) is ensemble
    assert ensemble.draw(6, torch.tensor([0]), torch.Generator()) is ensemble


def test_drawn_teachers_stand_for_all_on_average():
    """The mean over many draws of the drawn weights comes near the weights of all."""
    raw = torch.rand(5, CLASSES, generator=torch.Generator().manual_seed(0)) + 0.2
    ensemble = Ensemble([tiny_vit(k) for k in range(5)], raw / raw.sum(0))
    generator, total = torch.Generator().manual_seed(1), torch.zeros(5, CLASSES)
    for _ in range(400):
        few = ensemble.draw(3, torch.arange(CLASSES), generator)
        for teacher, weights in zip(few.teachers, few.weights, strict=True):
            total[ensemble.teachers.index(teacher)] += weights / 400
    assert torch.allclose(total, ensemble.weights, atol=0.05)


HISTOGRAMS = torch.tensor([[90, 0, 10, 0], [10, 50, 0, 0], [0, 50, 40, 0]])
EXAMPLES = HISTOGRAMS.sum(1)
HEADS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weighting", ["uniform", "examples", "histogram", "competence"])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weights_sum_to_one_for_each_class(weighting, power):
    weights = class_weights(evidence(weighting, Knowledge(EXAMPLES, HISTOGRAMS, HEADS)), power)
    assert weights.shape == (3, 4)
    assert torch.allclose(weights.sum(0), torch.ones(4), atol=1e-6)
    assert bool((weights >= 0).all())


def test_histogram_weights_are_shares_of_each_class_and_uniform_where_nobody_has_it():
    weights = class_weights(evidence("histogram", Knowledge(EXAMPLES, HISTOGRAMS, HEADS)), 1.0)
    assert torch.allclose(weights[:, 0], torch.tensor([0.9, 0.1, 0.0]))
    assert torch.allclose(weights[:, 3], torch.full((3,), 1 / 3))


def test_a_client_without_a_class_has_no_say_in_it_at_any_power():
    weights = class_weights(evidence("histogram", Knowledge(EXAMPLES, HISTOGRAMS, HEADS)), 0.5)
    assert weights[2, 0] == 0
    assert weights[0, 0] == pytest.approx(90**0.5 / (90**0.5 + 10**0.5))


def test_withheld_histograms_are_an_error_that_names_the_key():
    with pytest.raises(ValueError, match=r"ensemble\.weighting"):
        evidence("histogram", Knowledge(EXAMPLES, None, HEADS))


def test_competence_ranks_the_classes_by_how_far_their_head_rows_moved():
    updates = torch.zeros(1, 4, 6)
    updates[0, 1, 0], updates[0, 2, 1] = 3.0, -1.0
    estimate = competence(updates, torch.tensor([100]))[0]
    assert estimate[1] > estimate[2] > estimate[0]
    assert float(estimate.sum()) == pytest.approx(100)


def test_evidence_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        class_weights(torch.tensor([[float("nan")]]), 1.0)
