"""What each teacher makes of an image, against plain recomputation."""

import copy

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.settings import DistillSettings
from fedmitr_flwr.stages.distillation.distill import distill
from fedmitr_flwr.stages.distillation.losses import loss_terms
from fedmitr_flwr.stages.distillation.pool import Pool, label_patches, unnamed_pool
from fedmitr_flwr.stages.distillation.teacher_heads import Branches
from tests.unit.stages.test_distill import IMAGES, B
from tests.unit.tiny import CLASSES, PATCH, SIZE, tiny_ensemble, tiny_grid, tiny_vit

SETTINGS = DistillSettings(views=1, noise=0.0, steps=60, batch_size=4, learning_rate=3e-3)
OFF = {"feature_weight": 0.0, "teacher_weight": 0.0}


def labelled(ensemble: Ensemble, settings: DistillSettings = SETTINGS) -> Pool:
    patches = tiny_grid().to_patches(IMAGES)
    return unnamed_pool(patches, label_patches(ensemble, patches, settings, batch_size=4))


def token(model, image):
    """[CLS] as the head of a timm model sees it."""
    return model.forward_head(model.forward_features(image[None]), pre_logits=True)[0]


def test_the_pool_keeps_each_teachers_token_as_its_head_sees_it():
    ensemble = tiny_ensemble()
    features = labelled(ensemble).further.targets.features
    assert features.shape == (B, 3, 24)
    assert features.dtype == torch.bfloat16
    for k, teacher in enumerate(ensemble.teachers):
        for b in range(B):
            assert torch.allclose(features[b, k].float(), token(teacher, IMAGES[b]), rtol=1e-2, atol=1e-4)


def test_terms_equal_plain_recomputation_with_any_maps():
    ensemble, student = tiny_ensemble(), tiny_vit(seed=50)
    made = labelled(ensemble)
    (features,) = [part for part in made.features() if len(part)]
    branches = Branches.of(ensemble, [features])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in branches.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    rows = torch.tensor([4, 0, 3])
    got = loss_terms(student, made.batch(rows), SETTINGS, branches)
    feature = teacher_kl = 0.0
    weight = ensemble.weights.mean(1) / ensemble.weights.mean(1).sum()
    for b in rows.tolist():
        own = token(student, IMAGES[b])
        for k, teacher in enumerate(ensemble.teachers):
            wanted = features[b, k].float()
            mapped = (own @ branches.maps[k] + branches.shifts[k]).detach()
            unit = sum(float(features[:, k, d].float().var()) for d in range(24)) / 24
            feature += float(weight[k]) * float(((mapped - wanted) ** 2).mean()) / unit
            p, q = (teacher.head(x).softmax(-1) for x in (wanted, mapped))
            teacher_kl += float(weight[k]) * float((p * (p / q).log()).sum())
    assert float(got.feature) == pytest.approx(feature / 3, rel=1e-4)
    assert float(got.teacher) == pytest.approx(teacher_kl / 3, rel=1e-4)


def test_both_terms_are_zero_for_a_student_that_is_every_teacher():
    one = tiny_vit(seed=9)
    ensemble = Ensemble([copy.deepcopy(one) for _ in range(2)], torch.full((2, CLASSES), 0.5))
    made = labelled(ensemble)
    terms = loss_terms(one, made.batch(torch.arange(B)), SETTINGS, Branches.of(ensemble, made.features()))
    assert float(terms.feature) < 1e-4  # of bf16
    assert float(terms.teacher) < 1e-4


def test_maps_learn_beside_the_student_and_teachers_heads_do_not():
    ensemble, student = tiny_ensemble(), tiny_vit(seed=50).requires_grad_(True)
    made = labelled(ensemble)
    branches = Branches.of(ensemble, made.features())
    before = loss_terms(student, made.batch(torch.arange(B)), SETTINGS, branches)
    heads = branches.weight.clone()
    distill(student, made, SETTINGS, generator=torch.Generator().manual_seed(0), branches=branches)
    after = loss_terms(student, made.batch(torch.arange(B)), SETTINGS, branches)
    assert float(after.feature) < 0.5 * float(before.feature)
    assert float(after.teacher) < 0.5 * float(before.teacher)
    assert not torch.equal(branches.maps[0], torch.eye(24))
    assert not torch.equal(branches.maps[0], branches.maps[1])
    assert torch.equal(branches.weight, heads)


def test_with_both_weights_zero_nothing_is_kept():
    settings = SETTINGS.model_copy(update=OFF)
    assert labelled(tiny_ensemble(), settings).further.targets.features is None


def test_teachers_with_a_second_head_and_in_bf16_are_read_by_their_first():
    shape = {"img_size": SIZE, "patch_size": PATCH, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    teachers = [VisionTransformerDistilled(**shape, num_classes=CLASSES).eval() for _ in range(2)]
    exact = [teacher.forward_features(IMAGES)[:, 0].detach() for teacher in teachers]
    ensemble = Ensemble([teacher.bfloat16() for teacher in teachers], torch.full((2, CLASSES), 0.5))
    made = labelled(ensemble)
    branches = Branches.of(ensemble, made.features())
    assert branches.weight.dtype == torch.float32
    for k in range(2):
        assert torch.allclose(made.further.targets.features[:, k].float(), exact[k], atol=0.1)
        assert torch.allclose(branches.weight[k], teachers[k].head.weight.float())


@pytest.mark.parametrize("count", [1, 5])
def test_images_that_do_not_differ_are_measured_by_the_tokens_size(count):
    features = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(4)).expand(count, -1, -1)
    made = Branches.of(tiny_ensemble(), [features])
    assert torch.allclose(made.variance, 0.01 * features[0].square().mean(1))


def test_a_pool_of_one_image_can_be_learnt():
    ensemble, student = tiny_ensemble(), tiny_vit(seed=50).requires_grad_(True)
    patches = tiny_grid().to_patches(IMAGES[:1])
    made = unnamed_pool(patches, label_patches(ensemble, patches, SETTINGS, batch_size=4))
    branches = Branches.of(ensemble, made.features())
    settings = SETTINGS.model_copy(update={"steps": 5})
    distill(student, made, settings, generator=torch.Generator().manual_seed(0), branches=branches)
    assert bool(student.head.weight.isfinite().all())
