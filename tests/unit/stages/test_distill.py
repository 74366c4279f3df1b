from dataclasses import replace
from typing import get_args

import pytest
import torch

from fedmitr_flwr.settings import DistillSettings, RandomFamily, RelabelSettings
from fedmitr_flwr.stages.density import PatchSplit
from fedmitr_flwr.stages.distillation.distill import distill
from fedmitr_flwr.stages.distillation.losses import kl_divergence, loss_terms
from fedmitr_flwr.stages.distillation.pool import Pool, Targets, make_pool, mix_patches
from fedmitr_flwr.stages.random_images.families import random_images
from fedmitr_flwr.stages.relabel import LowTargets, RelabelledImages, relabel
from fedmitr_flwr.stages.synthetic import SyntheticImages
from tests.unit.tiny import CLASSES, plain_ensemble, plain_subset_logits, tiny_ensemble, tiny_grid, tiny_vit

B = 6
IMAGES = torch.randn(B, 1, 16, 16, generator=torch.Generator().manual_seed(7)).clamp(-1, 2)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
KEPT = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(b))[:5].sort().values for b in range(B)])
SPLIT = PatchSplit(torch.zeros(B, 16, dtype=torch.bool).scatter(1, KEPT, True))
PLAIN = {"views": 1, "mix": 0.0, "noise": 0.0}


def pool(settings: DistillSettings, low: str = "soft") -> Pool:
    grid, ensemble = tiny_grid(), tiny_ensemble()
    low_targets = relabel(ensemble, grid.to_patches(IMAGES), SPLIT, RelabelSettings(labels=low))
    synthetic = SyntheticImages(IMAGES, LABELS, KEPT, torch.zeros(B))
    made = RelabelledImages(synthetic, SPLIT, low_targets)
    return make_pool(ensemble, made, grid, settings, generator=torch.Generator().manual_seed(0))


def by_hand_kl(target: torch.Tensor, logits: torch.Tensor) -> float:
    total = 0.0
    for p, q in zip(target, logits.softmax(-1), strict=True):
        total += sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q, strict=True))
    return total / len(target)


@pytest.mark.parametrize("ce_on", ["full", "high"])
def test_loss_terms_equal_hand_computed_values(ce_on):
    settings = DistillSettings(ce_on=ce_on, **PLAIN)
    student, ensemble, rows = tiny_vit(seed=50), tiny_ensemble(), torch.arange(B)
    got = loss_terms(student, pool(settings).batch(rows), settings)
    full = student(IMAGES)
    seen = full if ce_on == "full" else plain_subset_logits(student, IMAGES, KEPT)
    low = SPLIT.low.nonzero()[:, 1].reshape(B, 11)
    assert float(got.kl) == pytest.approx(by_hand_kl(plain_ensemble(ensemble, IMAGES), full), abs=1e-5)
    by_hand_ce = -sum(float(row.softmax(-1)[y].log()) for row, y in zip(seen, LABELS, strict=True)) / B
    assert float(got.ce) == pytest.approx(by_hand_ce, abs=1e-5)
    expected = by_hand_kl(plain_ensemble(ensemble, IMAGES, low), plain_subset_logits(student, IMAGES, low))
    assert float(got.low) == pytest.approx(expected, abs=1e-5)


def test_total_weights_the_terms():
    settings = DistillSettings(kl_weight=2.0, ce_weight=0.5, low_weight=3.0, **PLAIN)
    terms = loss_terms(tiny_vit(seed=50), pool(settings).batch(torch.arange(B)), settings)
    terms = replace(terms, feature=torch.tensor(0.3), teacher=torch.tensor(0.7))
    settings = settings.model_copy(update={"feature_weight": 5.0, "teacher_weight": 7.0})
    expected = 2.0 * terms.kl + 0.5 * terms.ce + 3.0 * terms.low + 5.0 * 0.3 + 7.0 * 0.7
    assert float(terms.total(settings)) == pytest.approx(float(expected))


@pytest.mark.parametrize("change", [{"low_weight": 0.0}, {"ce_weight": 0.0}])
def test_a_term_of_weight_zero_is_not_there(change):
    settings = DistillSettings(**change, **PLAIN)
    terms = loss_terms(tiny_vit(seed=50), pool(settings).batch(torch.arange(B)), settings)
    assert float(getattr(terms, next(iter(change)).removesuffix("_weight"))) == 0.0


def test_low_labels_off_removes_the_low_term():
    settings = DistillSettings(**PLAIN)
    assert float(loss_terms(tiny_vit(seed=50), pool(settings, "off").batch(torch.arange(B)), settings).low) == 0.0


def test_ensemble_targets_are_constants():
    settings = DistillSettings(**PLAIN)
    student = tiny_vit(seed=50).requires_grad_(True)
    made = pool(settings)
    assert not made.inverted.targets.probabilities.requires_grad
    loss_terms(student, made.batch(torch.arange(B)), settings).total(settings).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_temperature_scales_both_sides():
    target = torch.tensor([[0.7, 0.2, 0.1]])
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    p = (target.log() / 2).softmax(-1)
    expected = 4 * float((p * (p.log() - (logits / 2).log_softmax(-1))).sum())
    assert float(kl_divergence(target, logits, 2.0)) == pytest.approx(expected, abs=1e-6)


def test_pool_holds_views_mixes_and_noise_labelled_by_the_ensemble():
    whole = pool(DistillSettings(views=3, mix=2.0, noise=1.5, augment="shift"))
    made = whole.batch(torch.arange(len(whole))).images
    assert len(made.labels) == 3 * B + 2 * B + 9
    assert made.labels[: 3 * B].tolist() == LABELS.tolist() * 3
    assert made.labels[3 * B :].unique().tolist() == [-1]
    images = tiny_grid().to_images(made.patches)
    assert torch.equal(images[:B], IMAGES)
    assert torch.allclose(made.targets.probabilities, plain_ensemble(tiny_ensemble(), images), atol=1e-6)


def test_images_without_pseudo_label_join_only_the_first_term():
    settings = DistillSettings(views=1, mix=1.0, noise=0.0)
    terms = loss_terms(tiny_vit(seed=50), pool(settings).batch(torch.arange(B, 2 * B)), settings)
    assert float(terms.kl) > 0
    assert float(terms.ce) == float(terms.low) == 0.0


def test_mixed_images_take_each_patch_from_one_of_two():
    grid = tiny_grid()
    mixed = grid.to_patches(mix_patches(IMAGES, 20, grid, torch.Generator().manual_seed(1)))
    source = grid.to_patches(IMAGES)
    for image in mixed:
        origins = [{b for b in range(B) if torch.equal(source[b, p], image[p])} for p in range(16)]
        assert all(origins)
        assert len({min(o) for o in origins}) <= 2


@pytest.mark.parametrize("kind", get_args(RandomFamily))
def test_random_images_lie_in_the_valid_range_and_repeat_with_their_seed(kind: RandomFamily):
    grid = tiny_grid(3)
    a, b = (random_images(kind, 30, grid, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (30, 3, 16, 16)
    assert float(a.min()) >= -1.0
    assert float(a.max()) <= 2.0


def test_shapes_are_painted_on_plain_grounds_of_which_half_are_white():
    images = random_images("shapes", 300, tiny_grid(3), torch.Generator().manual_seed(4))
    corners = torch.stack([images[:, :, y, x] for y in (0, -1) for x in (0, -1)], 1)  # (300, 4, 3)
    plain = (corners == corners[:, :1]).all(2).sum(1) >= 2
    white = (corners == 2.0).all(2).sum(1) >= 2
    assert float(plain.float().mean()) > 0.8
    assert 0.35 < float(white.float().mean()) < 0.65
    colours = torch.tensor([len(image.flatten(1).round(decimals=2).unique(dim=1).T) for image in images])
    assert int(colours.min()) > 1


def test_distillation_lowers_the_loss_and_repeats_bit_for_bit():
    settings = DistillSettings(steps=40, batch_size=4, learning_rate=3e-3, views=2, mix=1.0, noise=1.0)
    made, states = pool(settings), []
    for _ in range(2):
        student = tiny_vit(seed=50).requires_grad_(True)
        before = float(loss_terms(student, made.batch(torch.arange(B)), settings).total(settings))
        distill(student, made, settings, generator=torch.Generator().manual_seed(1))
        assert float(loss_terms(student, made.batch(torch.arange(B)), settings).total(settings)) < 0.6 * before
        states.append(student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_loss_that_is_not_finite_is_an_error():
    settings = DistillSettings(steps=2, batch_size=4, **PLAIN)
    made = pool(settings)
    unknown = Targets(torch.full((B, CLASSES), float("nan")), None)
    broken = replace(
        made, inverted=replace(made.inverted, targets=unknown), further=replace(made.further[:0], targets=unknown[:0])
    )
    with pytest.raises(RuntimeError, match="not finite after 2 steps"):
        distill(tiny_vit(seed=50).requires_grad_(True), broken, settings, generator=torch.Generator().manual_seed(0))


def test_images_without_low_patches_have_no_low_target():
    settings = DistillSettings(**PLAIN)
    made = pool(settings)
    none = LowTargets(made.low_targets.probabilities, torch.zeros(B, dtype=torch.bool))
    made = replace(made, low_targets=none)
    assert float(loss_terms(tiny_vit(seed=50), made.batch(torch.arange(B)), settings).low) == 0.0
