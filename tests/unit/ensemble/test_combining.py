"""`ensemble.combine`: the rules equal their formulas, and the loss has an exact gradient under each of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.ensemble.combining import COMBINATIONS
from fedmitr_flwr.ensemble.ensemble import Ensemble
from tests.unit.tiny import CLASSES, tiny_ensemble, tiny_grid

LOGITS = 3 * torch.randn(3, 4, CLASSES, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 4])
PATCHES = tiny_grid().to_patches(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(7)))


def plain(rule: str, logits: Tensor, weights: Tensor) -> Tensor:
    """The formula of a rule, class by class in fp64."""
    out = torch.zeros(logits.shape[1:], dtype=torch.float64)
    for k, z in enumerate(logits.double()):
        each = {"probabilities": z.softmax(-1), "logits": z, "sigmoids": 1 / (1 + (-z).exp())}[rule]
        for c in range(CLASSES):
            out[:, c] += float(weights[k, c]) * each[:, c]
    out = out.exp() if rule == "logits" else out
    return out / out.sum(1, keepdim=True)


def ensemble_of(rule: str) -> Ensemble:
    made = tiny_ensemble()
    return Ensemble(made.teachers, made.weights, rule=rule)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_each_rule_equals_its_formula(rule: str) -> None:
    weights = tiny_ensemble().weights
    got = COMBINATIONS[rule](LOGITS, weights)
    assert torch.allclose(got.probabilities.double(), plain(rule, LOGITS, weights), atol=1e-6)
    assert torch.allclose(got.logs.exp(), got.probabilities, atol=1e-6)


def test_the_rules_differ() -> None:
    first, second, third = (ensemble_of(rule)(PATCHES).probabilities for rule in COMBINATIONS)
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(first, third, atol=1e-3)
    assert not torch.allclose(second, third, atol=1e-3)


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_the_gradient_of_the_loss_is_that_of_the_formula(rule: str) -> None:
    ensemble, patches = ensemble_of(rule), PATCHES.clone().requires_grad_(True)
    logits = torch.stack([teacher(tiny_grid().to_images(patches)) for teacher in ensemble.teachers])
    loss = F.nll_loss(plain(rule, logits, ensemble.weights).log(), LABELS, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), patches)
    got = ensemble.loss_gradient(PATCHES, None, LABELS)
    assert torch.allclose(got.loss.double(), loss.detach(), atol=1e-5)
    assert torch.allclose(got.gradient, gradient, atol=1e-5)
    assert torch.allclose(got.probabilities, ensemble(PATCHES).probabilities, atol=1e-6)


@pytest.mark.parametrize("rule", ["logits", "sigmoids"])
def test_a_class_of_tiny_probability_still_has_a_gradient(rule: str) -> None:
    logits = torch.tensor([[[90.0, -90.0]], [[80.0, -85.0]]], requires_grad=True)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    (-COMBINATIONS[rule](logits, weights).logs[0, 1]).backward()
    assert logits.grad is not None
    assert weights.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert bool(torch.isfinite(weights.grad).all())
    assert float(logits.grad[1, 0, 1]) < -0.5


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_drawn_and_reweighted_teachers_are_combined_by_the_same_rule(rule: str) -> None:
    ensemble = ensemble_of(rule)
    few = ensemble.draw(2, LABELS, torch.Generator().manual_seed(0))
    assert torch.allclose(few.combine(LOGITS[:2]).double(), plain(rule, LOGITS[:2], few.weights), atol=1e-6)
    even = torch.full((3, CLASSES), 1 / 3)
    assert torch.allclose(ensemble.with_weights(even).combine(LOGITS).double(), plain(rule, LOGITS, even), atol=1e-6)
