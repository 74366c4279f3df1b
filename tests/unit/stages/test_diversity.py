"""The contrastive term, and how terms join the ensemble's backward pass."""

import math

import pytest
import torch
from torch.nn import functional as F

from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.vit import forward_patches
from fedmitr_flwr.settings import InversionSettings, Settings, SettingsError
from fedmitr_flwr.stages.inversion.terms import Diversity, contrast, similarities
from tests.unit.ensemble.test_engine import variant
from tests.unit.stages.test_inversion import LABELS, run
from tests.unit.tiny import CLASSES, tiny_ensemble, tiny_grid, tiny_vit

PLAIN = InversionSettings(iterations=40, stops=(8,), fractions=(0.3,), tv_weight=0.02, batch_size=6)
DIVERSE = PLAIN.model_copy(update={"diversity": 2.0, "diversity_temperature": 0.5})
INDEX = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :9].sort(1).values
PATCHES = torch.randn(6, 9, 16, generator=torch.Generator().manual_seed(2)).clamp(-1, 2)


def weighted(teachers):
    weights = torch.rand(len(teachers), CLASSES, generator=torch.Generator().manual_seed(3)) + 0.1
    return Ensemble(teachers, weights / weights.sum(0))


def by_hand(ensemble, weight, temperature):
    """Loss and gradient from autograd alone, image by image and pair by pair."""
    patches = PATCHES.clone().requires_grad_(True)
    total = F.nll_loss(ensemble(patches, INDEX).probabilities.log(), LABELS, reduction="sum")
    for teacher, weights in zip(ensemble.teachers, ensemble.weights, strict=True):
        rows = forward_patches(teacher, patches, INDEX).features
        for i in range(6):
            others = [torch.corrcoef(torch.stack([rows[i], rows[j]]))[0, 1] for j in range(6) if j != i]
            away = sum(((other - 1) / temperature).exp() for other in others)
            total = total + weight * weights[LABELS[i]] * torch.log1p(away)
    return torch.autograd.grad(total, patches)[0]


TEACHERS = {
    "packed": lambda: [tiny_vit(k) for k in range(3)],
    "distilled": lambda: [variant("deit_tiny_distilled_patch16_224", depth=2)],
    "one block": lambda: [tiny_vit(0, depth=1)],
    "by autograd": lambda: [variant("vit_tiny_patch16_224", depth=2, qk_norm=True)],
    "mixed": lambda: [tiny_vit(0), tiny_vit(1, depth=3), variant("vit_tiny_patch16_224", depth=2, qk_norm=True)],
}


@pytest.mark.parametrize("teachers", TEACHERS.values(), ids=TEACHERS.keys())
def test_gradient_of_cross_entropy_and_diversity_equals_autograd(teachers):
    ensemble = weighted(teachers())
    expected = by_hand(ensemble, 0.3, 0.5)
    got = ensemble.loss_gradient(PATCHES, INDEX, LABELS, terms=[Diversity(0.3, 0.5)])
    plain = ensemble.loss_gradient(PATCHES, INDEX, LABELS)
    scale = max(1.0, float(expected.abs().max()))
    assert float((got.gradient - plain.gradient).abs().max()) > 1e-3  # so that the next line can fail
    assert torch.allclose(got.gradient, expected, rtol=0, atol=2e-6 * scale)
    assert torch.equal(got.loss, plain.loss)


def test_a_second_forward_pass_gives_the_same_gradient_as_kept_activations(monkeypatch):
    monkeypatch.setattr("fedmitr_flwr.ensemble.engine.groups.STEP_ROWS", 1)  # one teacher a step
    kept = tiny_ensemble()
    twice = Ensemble(kept.teachers, kept.weights, MemoryLimits(activations=0))
    term = [Diversity(0.3, 0.5)]
    expected = kept.loss_gradient(PATCHES, INDEX, LABELS, terms=term).gradient
    assert torch.equal(twice.loss_gradient(PATCHES, INDEX, LABELS, terms=term).gradient, expected)


def test_a_term_of_weight_zero_changes_no_bit():
    ensemble = tiny_ensemble()
    got = ensemble.loss_gradient(PATCHES, INDEX, LABELS, terms=[Diversity(0.0, 0.5)])
    plain = ensemble.loss_gradient(PATCHES, INDEX, LABELS)
    assert torch.equal(got.gradient, plain.gradient)
    assert torch.equal(got.loss, plain.loss)


def test_a_term_may_look_at_the_pixels_alone_and_at_the_probabilities():
    ensemble = tiny_ensemble()
    plain = ensemble.loss_gradient(PATCHES, INDEX, LABELS)
    got = ensemble.loss_gradient(PATCHES, INDEX, LABELS, terms=[lambda seen: seen.patches.square().sum()])
    assert torch.allclose(got.gradient, plain.gradient + 2 * PATCHES, atol=1e-6)
    opposed = [lambda seen: seen.probabilities.gather(1, seen.labels[:, None]).log().sum()]
    got = ensemble.loss_gradient(PATCHES, INDEX, LABELS, terms=opposed)
    assert torch.allclose(got.gradient, torch.zeros_like(PATCHES), atol=1e-6)


def test_the_term_lies_between_nearly_nothing_and_the_logarithm_of_the_batch():
    same = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(0)).expand(2, 6, 24)
    assert torch.allclose(contrast(same, 0.1), torch.full((2, 6), math.log(6)), atol=1e-4)
    apart = torch.cat([same[:, :1], -same[:, :1]], 1)
    assert torch.allclose(contrast(apart, 0.1), torch.zeros(2, 2), atol=1e-6)


def test_an_image_alone_has_nothing_to_differ_from():
    alone = torch.tensor([2])
    assert torch.equal(run(DIVERSE, labels=alone).images, run(PLAIN, labels=alone).images)


def test_diverse_images_look_less_alike_to_the_teachers_and_still_like_their_labels():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    plain, diverse = run(PLAIN, labels=labels), run(DIVERSE, labels=labels)
    ensemble, grid = tiny_ensemble(), tiny_grid()

    def alike(made):
        patches = grid.to_patches(made.images).gather(1, made.kept[..., None].expand(-1, -1, 16))
        found = [similarities(forward_patches(t, patches, made.kept).features)[:3, :3] for t in ensemble.teachers]
        pairs = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
        return float(torch.stack([each[pairs].mean() for each in found]).mean())

    assert alike(diverse) < alike(plain) - 0.1
    assert float(diverse.loss.max()) < 0.5


def test_diverse_images_repeat_bit_for_bit():
    assert torch.equal(run(DIVERSE).images, run(DIVERSE).images)
    assert not torch.equal(run(DIVERSE).images, run(PLAIN).images)


@pytest.mark.parametrize(
    "change",
    [{"inversion.diversity": -0.1}, {"inversion.diversity": 1001.0}, {"inversion.diversity-temperature": 0.0}],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(SettingsError, match=next(iter(change)).replace(".", r"\.")):
        Settings.from_run_config(change)
