"""A further model whose distribution multiplies that of the ensemble: outputs, exact gradients, drawn and paged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.ensemble.combining import COMBINATIONS
from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits, PagedTeachers
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.stages.inversion.terms import Diversity
from tests.unit.ensemble.test_engine import variant
from tests.unit.ensemble.test_teachers import CPU, stored
from tests.unit.tiny import CLASSES, tiny_ensemble, tiny_grid, tiny_vit

LABELS = torch.tensor([0, 1, 2, 4])
IMAGES = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(7))
PATCHES = tiny_grid().to_patches(IMAGES)
INDEX = torch.tensor([[0, 3, 7], [1, 2, 15], [4, 5, 6], [8, 9, 10]])
FEW = PATCHES.gather(1, INDEX[..., None].expand(-1, -1, 16))
LIKE = ["of the teachers' architecture", "deeper", "run by autograd"]


def expert(like: str = LIKE[0]):  # type: ignore[no-untyped-def]
    if like == "run by autograd":
        return variant("vit_tiny_patch16_224", depth=2, qk_norm=True)
    return tiny_vit(50, depth=3 if like == "deeper" else 2)


def with_expert(rule: str = "probabilities", like: str = LIKE[0], limits: MemoryLimits | None = None) -> Ensemble:
    made = tiny_ensemble()
    return Ensemble(made.teachers, made.weights, limits, rule=rule, expert=expert(like))  # type: ignore[arg-type]


def product(ensemble: Ensemble, plain: Tensor, patches: Tensor, index: Tensor | None = None) -> Tensor:
    """The ensemble's distribution times the expert's, normalised."""
    assert ensemble.expert is not None
    alone = Ensemble([ensemble.expert], torch.ones(1, CLASSES))(patches, index).probabilities
    return plain * alone / (plain * alone).sum(1, keepdim=True)


def without(ensemble: Ensemble) -> Ensemble:
    return Ensemble(ensemble.teachers, ensemble.weights, rule=ensemble.rule)


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("rule", COMBINATIONS)
def test_the_distribution_is_the_product_of_the_ensembles_and_the_experts(rule: str, like: str) -> None:
    ensemble = with_expert(rule, like)
    for patches, index in ((PATCHES, None), (FEW, INDEX)):
        plain = without(ensemble)(patches, index).probabilities
        expected = product(ensemble, plain, patches, index)
        assert torch.allclose(ensemble(patches, index).probabilities, expected, atol=1e-6)
        learnt = ensemble(patches.clone().requires_grad_(True), index).probabilities
        assert torch.allclose(learnt, expected, atol=1e-5)
        assert not torch.allclose(expected, plain, atol=1e-2)


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("rule", COMBINATIONS)
def test_the_loss_and_its_gradient_are_those_of_the_product(rule: str, like: str) -> None:
    ensemble = with_expert(rule, like)
    for patches, index in ((PATCHES, None), (FEW, INDEX)):
        pixels = patches.clone().requires_grad_(True)
        out = product(ensemble, without(ensemble)(pixels, index).probabilities, pixels, index)
        loss = F.nll_loss(out.log(), LABELS, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), pixels)
        got = ensemble.loss_gradient(patches, index, LABELS)
        assert torch.allclose(got.loss, loss, atol=1e-5)
        assert torch.allclose(got.gradient, gradient, atol=1e-5)
        assert torch.allclose(got.probabilities, out, atol=1e-6)


def test_forward_passes_that_run_twice_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmitr_flwr.ensemble.engine.groups.STEP_ROWS", 1)  # one model a step
    kept, twice = with_expert(), with_expert(limits=MemoryLimits(activations=0))
    expected = kept.loss_gradient(PATCHES, None, LABELS).gradient
    assert torch.equal(twice.loss_gradient(PATCHES, None, LABELS).gradient, expected)


def test_attention_and_further_loss_terms_are_those_of_the_teachers_alone() -> None:
    ensemble = with_expert()
    plain = without(ensemble)
    for one, other in (
        (ensemble(PATCHES, attention=True, labels=LABELS), plain(PATCHES, attention=True, labels=LABELS)),
        (ensemble.loss_gradient(PATCHES, None, LABELS), plain.loss_gradient(PATCHES, None, LABELS)),
    ):
        assert one.attention is not None
        assert other.attention is not None
        assert torch.allclose(one.attention, other.attention, atol=1e-6)
    terms = [Diversity(0.5, 0.3)]
    added = [
        each.loss_gradient(PATCHES, None, LABELS, terms=terms).gradient
        - each.loss_gradient(PATCHES, None, LABELS).gradient
        for each in (ensemble, plain)
    ]
    assert torch.allclose(*added, atol=1e-5)


def test_outputs_of_the_teachers_have_only_the_experts_logits_added() -> None:
    ensemble = with_expert()
    seen, plain = ensemble.see(PATCHES, features=True), without(ensemble).see(PATCHES, features=True)
    assert ensemble.num_models == 4
    assert torch.allclose(seen.logits[:3], plain.logits, atol=1e-5)
    assert torch.allclose(seen.logits[3], expert()(IMAGES), atol=1e-4)
    assert seen.features is not None
    assert plain.features is not None
    assert torch.allclose(seen.features, plain.features, atol=1e-5)
    assert seen.attention.shape == plain.attention.shape
    with pytest.raises(ValueError, match="logits of 3 models do not fit an ensemble of 4"):
        ensemble.combine(plain.logits)


def test_drawn_and_reweighted_teachers_keep_the_expert() -> None:
    ensemble = with_expert("logits")
    few = ensemble.draw(2, LABELS, torch.Generator().manual_seed(0))
    assert len(few.teachers) == 2
    even = ensemble.with_weights(torch.full((3, CLASSES), 1 / 3))
    for other in (few, even):
        expected = product(other, without(other)(PATCHES).probabilities, PATCHES)
        assert torch.allclose(other(PATCHES).probabilities, expected, atol=1e-6)


def test_the_expert_joins_teachers_that_are_read_from_disk(tmp_path: Path) -> None:
    held = with_expert()
    states = stored(tmp_path, held.teachers)
    teachers = PagedTeachers(tiny_vit(), states, CPU)
    disk = Ensemble(teachers, held.weights, MemoryLimits(teachers=0), expert=expert())
    assert len(disk.teachers) == 3
    got, expected = (each.loss_gradient(PATCHES, None, LABELS) for each in (disk, held))
    for name in ("loss", "gradient", "attention", "probabilities"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    few, same = (each.draw(2, LABELS, torch.Generator().manual_seed(0)) for each in (disk, held))
    assert torch.equal(few(PATCHES).probabilities, same(PATCHES).probabilities)


def test_an_expert_that_excludes_a_class_leaves_it_no_probability_and_a_finite_loss() -> None:
    one = expert()
    with torch.no_grad():
        one.head.weight[4], one.head.bias[4] = 0.0, -300.0
    made = tiny_ensemble()
    for rule in COMBINATIONS:
        ensemble = Ensemble(made.teachers, made.weights, rule=rule, expert=one)  # type: ignore[arg-type]
        assert bool((ensemble(PATCHES).probabilities[:, 4] < 1e-30).all())
        got = ensemble.loss_gradient(PATCHES, None, LABELS)
        assert float(got.loss[3]) > 100.0
        assert bool(torch.isfinite(got.gradient).all())
        assert bool((got.gradient[3] != 0).any())
