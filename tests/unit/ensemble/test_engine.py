"""The hand-written passes against the plain reference: same kept sets, full-size token counts."""

import pytest
import timm
import torch
from torch.nn import functional as F

from benchmarks.inversion.reference import PlainInversion
from fedmitr_flwr.ensemble.engine.packing import architecture_of, pack
from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_patches
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.stages.inversion.pixel_adam import scatter
from fedmitr_flwr.stages.inversion.prior import Prior
from tests.unit.tiny import CLASSES, tiny_ensemble, tiny_grid, tiny_vit

GRID = PatchGrid(3, 224, (16, 16), torch.full((3,), -2.0), torch.full((3,), 2.0))
SETTINGS = InversionSettings(tv_weight=0.05, learning_rate=0.1)
LABELS = torch.tensor([1, 4])


def teacher(seed: int, width: int = 96, depth: int = 3) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("deit_tiny_patch16_224", embed_dim=width, depth=depth, num_heads=3, num_classes=10)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # or folding them would go untested
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif "head" in name or "proj" in name:  # timm's start gives gradients of 1e-5
                parameter.mul_(5)
    return model.eval()


def batch(K: int, tokens: int, width: int = 96, depth: int = 3):
    """Teachers, weights, images, kept patches, and the reference on them."""
    teachers = [teacher(k, width, depth) for k in range(K)]
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.rand(K, 10, generator=generator) + 0.1
    weights = weights / weights.sum(0)
    images = torch.randn(len(LABELS), 3, 224, 224, generator=generator).clamp(-2, 2)
    kept = torch.rand(len(LABELS), 196, generator=generator).argsort(1)[:, : tokens - 1].sort(1).values
    return teachers, weights, images, kept, PlainInversion(teachers, weights, images, LABELS, kept, GRID, SETTINGS)


def ours(teachers, weights, images, kept, dtype=torch.float32):
    patches = GRID.to_patches(images).gather(1, kept[..., None].expand(-1, -1, 768))
    return patches, Ensemble(teachers, weights).loss_gradient(patches, kept, LABELS, dtype)


def reference_gradient(reference, loss, kept):
    (gradient,) = torch.autograd.grad(loss.sum(), reference.images)
    return GRID.to_patches(gradient).gather(1, kept[..., None].expand(-1, -1, 768))


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("tokens", [197, 138, 97, 68, 47])
def test_loss_and_gradient_equal_the_plain_reference(tokens, K):
    teachers, weights, images, kept, reference = batch(K, tokens)
    loss = reference.cross_entropy()
    patches, got = ours(teachers, weights, images, kept)
    assert torch.allclose(got.loss, loss.detach(), rtol=1e-5, atol=0)
    expected = reference_gradient(reference, loss, kept)
    assert float(expected.abs().max()) > 1e-4  # so that the next line can fail
    assert torch.allclose(got.gradient, expected, rtol=0, atol=1e-6)
    total = reference_gradient(reference, 0.05 * reference.total_variation(), kept) + expected
    gradient = got.gradient.clone()
    canvas = scatter(GRID.to_patches(images), kept, torch.zeros_like(patches))
    Prior(canvas, kept, GRID, SETTINGS).add_gradient(patches, gradient)
    assert torch.allclose(gradient, total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [197, 47])
def test_a_whole_deit_tiny_equals_the_plain_reference(tokens):
    teachers, weights, images, kept, reference = batch(1, tokens, width=192, depth=12)
    loss = reference.cross_entropy()
    _, got = ours(teachers, weights, images, kept)
    assert torch.allclose(got.loss, loss.detach(), rtol=1e-5, atol=0)
    assert torch.allclose(got.gradient, reference_gradient(reference, loss, kept), rtol=0, atol=1e-6)


@pytest.mark.parametrize("K", [1, 5])
def test_bf16_gradients_point_the_same_way(K):
    teachers, weights, images, kept, _ = batch(K, 47, width=192, depth=6)
    _, exact = ours(teachers, weights, images, kept)
    _, got = ours(teachers, weights, images, kept, torch.bfloat16)
    assert got.gradient.dtype == got.loss.dtype == torch.float32
    assert float(F.cosine_similarity(got.gradient.flatten(1), exact.gradient.flatten(1)).min()) >= 0.999
    assert torch.allclose(got.loss, exact.loss, rtol=0.02)


VARIANTS = {
    "plain": {},
    "layer scale": {"init_values": 0.3},
    "no qkv bias": {"qkv_bias": False},
    "register tokens": {"reg_tokens": 2},
    "positions without class token": {"reg_tokens": 2, "no_embed_class": True},
    "one block": {"depth": 1},
}


def variant(name: str, **more):
    torch.manual_seed(0)
    model = timm.create_model(
        name, img_size=16, patch_size=4, in_chans=1, embed_dim=24, num_heads=3, num_classes=CLASSES, **more
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def agree(model) -> None:
    """Engine and autograd on a subset of the patches."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(3, 6, 16, generator=generator, requires_grad=True)
    index = torch.rand(3, 16, generator=generator).argsort(1)[:, :6]
    labels = torch.tensor([0, 1, 2])
    plain = forward_patches(model, patches, index, attention=True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(plain.logits, labels, reduction="sum"), patches)
    got = Ensemble([model], torch.ones(1, CLASSES)).loss_gradient(patches.detach(), index, labels)
    assert torch.allclose(got.gradient, gradient, atol=2e-6)
    assert torch.allclose(got.attention, plain.attention.detach(), atol=1e-6)
    assert torch.allclose(got.probabilities, plain.logits.softmax(-1).detach(), atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_the_architecture_are_packed_exactly(options):
    model = variant("vit_tiny_patch16_224", **{"depth": 2, **options})
    assert architecture_of(model) is not None
    agree(model)


def test_a_distilled_deit_is_packed_exactly():
    model = variant("deit_tiny_distilled_patch16_224", depth=2)
    assert architecture_of(model) is not None
    agree(model)


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"act_layer": "relu"}, {"pre_norm": True}])
def test_what_packs_do_not_have_runs_by_autograd(options):
    model = variant("vit_tiny_patch16_224", depth=2, **options)
    assert architecture_of(model) is None
    agree(model)


def test_different_architectures_are_not_packed_together():
    with pytest.raises(ValueError, match="packed together"):
        pack([tiny_vit(0, depth=2), tiny_vit(1, depth=3)])


def test_an_ensemble_of_mixed_architectures_equals_autograd():
    teachers = [tiny_vit(0), tiny_vit(1, depth=3), variant("vit_tiny_patch16_224", depth=2, qk_norm=True), tiny_vit(2)]
    weights = torch.rand(4, CLASSES, generator=torch.Generator().manual_seed(0))
    ensemble = Ensemble(teachers, weights / weights.sum(0))
    patches = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    out = ensemble(patches, attention=True, labels=labels)
    (gradient,) = torch.autograd.grad(F.nll_loss(out.probabilities.log(), labels, reduction="sum"), patches)
    got = ensemble.loss_gradient(patches.detach(), None, labels)
    assert torch.allclose(got.gradient, gradient, atol=2e-6)
    assert torch.allclose(got.attention, out.attention, atol=1e-6)
    assert torch.allclose(ensemble(patches.detach()).probabilities, out.probabilities.detach(), atol=1e-6)


def test_repeated_forward_passes_give_the_same_gradient_as_kept_activations(monkeypatch):
    ensemble, patches = tiny_ensemble(), tiny_grid().to_patches(torch.randn(4, 1, 16, 16))
    labels = torch.tensor([0, 1, 2, 3])
    monkeypatch.setattr("fedmitr_flwr.ensemble.engine.groups.STEP_ROWS", 1)  # one teacher a step
    kept = ensemble.loss_gradient(patches, None, labels)
    twice = Ensemble(ensemble.teachers, ensemble.weights, MemoryLimits(activations=0))
    assert torch.equal(twice.loss_gradient(patches, None, labels).gradient, kept.gradient)


def test_activations_do_not_grow_with_the_number_of_teachers():
    labels = torch.arange(100) % CLASSES
    patches = tiny_grid().to_patches(torch.randn(100, 1, 16, 16))
    sizes = []
    for K in (1, 12):
        ensemble = Ensemble([tiny_vit(k) for k in range(K)], torch.full((K, CLASSES), 1 / K), MemoryLimits(0))
        ensemble.loss_gradient(patches, None, labels)
        sizes.append(ensemble.activation_bytes)
        ensemble.release()
        assert ensemble.activation_bytes == 0
    assert 0 < sizes[0] == sizes[1]


def test_teachers_above_the_memory_limit_are_held_in_bf16_and_say_nearly_the_same():
    labels = torch.tensor([0, 1, 2, 3])
    patches = tiny_grid().to_patches(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    exact = tiny_ensemble().loss_gradient(patches, None, labels)
    rounded = Ensemble(tiny_ensemble().teachers, tiny_ensemble().weights, MemoryLimits(teachers=0))
    assert {parameter.dtype for parameter in rounded.teachers[0].parameters()} == {torch.bfloat16}
    got = rounded.loss_gradient(patches, None, labels)
    assert torch.allclose(got.loss, exact.loss, rtol=0.05, atol=0.05)
    assert float(F.cosine_similarity(got.gradient.flatten(1), exact.gradient.flatten(1)).min()) > 0.99
    plain = rounded(patches.clone().requires_grad_(True)).probabilities
    assert torch.allclose(plain, rounded(patches).probabilities, atol=1e-5)


def test_results_do_not_depend_on_what_was_computed_before():
    ensemble, grid = tiny_ensemble(), tiny_grid()
    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    patches, labels = grid.to_patches(images), torch.tensor([0, 1, 2, 3])
    first = ensemble.loss_gradient(patches, None, labels)
    index = torch.arange(5).repeat(4, 1)
    ensemble.loss_gradient(patches[:, :5], index, labels)
    ensemble(patches)
    again = ensemble.loss_gradient(patches, None, labels)
    assert torch.equal(first.gradient, again.gradient)
    assert torch.equal(first.loss, again.loss)
