from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedmitr_flwr.models.vit import (
    check_supported,
    forward_images,
    forward_patches,
    grid_size,
    patch_size,
    patchify,
    unpatchify,
)
from fedmitr_flwr.settings import SettingsError

SMALL = {"patch_size": 4, "embed_dim": 64, "num_heads": 4, "depth": 4}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "small-28": ("vit_tiny_patch16_224", {**SMALL, "img_size": 28, "in_chans": 1}),
    "small-32": ("vit_tiny_patch16_224", {**SMALL, "img_size": 32}),
    "deit-tiny": ("deit_tiny_patch16_224", {}),
    "deit-small": ("deit_small_patch16_224", {}),
    "deit-base": ("deit_base_patch16_224", {"depth": 1}),
    "vit-tiny": ("vit_tiny_patch16_224", {}),
    "vit-small": ("vit_small_patch16_224", {}),
    "vit-base": ("vit_base_patch16_224", {"depth": 1}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 56}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", {"img_size": 56, "embed_dim": 96, "num_heads": 4}),
    "deit3": ("deit3_small_patch16_224", {}),
    "clip-norm-pre": ("vit_base_patch16_clip_224", {"depth": 1}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "all-norms": (
        "vit_tiny_patch16_224",
        {**SMALL, "img_size": 32, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    ),
    "fc-norm": ("vit_tiny_patch16_224", {**SMALL, "img_size": 32, "fc_norm": True, "norm_layer": "rmsnorm"}),
    "no-positions": ("vit_tiny_patch16_224", {**SMALL, "img_size": 32, "pos_embed": "none", "qkv_bias": False}),
    "any-size": ("vit_tiny_patch16_224", {**SMALL, "img_size": 32, "dynamic_img_size": True}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str, **more: object) -> VisionTransformer:
    """A model whose every weight matters: no zero bias, no layer scale of 1e-5, no unit norm."""
    name, options = FAMILIES[family]
    model = timm.create_model(name, **{"img_size": 64, "depth": 2, "num_classes": 7, **options, **more})
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 and weight.shape[0] > 1 else 4
            weight.copy_(torch.randn(weight.shape, generator=draws) / fan_in**0.5 + ("norm" in key))
    return model.eval()


def make_images(model: VisionTransformer, count: int = 3) -> Tensor:
    shape = (count, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def some_patches(model: VisionTransformer, count: int = 3, kept: int = 5) -> Tensor:
    draws = torch.Generator().manual_seed(3)
    P = model.patch_embed.num_patches
    return torch.stack([torch.randperm(P, generator=draws)[:kept] for _ in range(count)])


def kept_tokens(model: VisionTransformer, images: Tensor, index: Tensor) -> Tensor:
    """The plain reference: embed everything, add positions, then take the other tokens away."""
    tokens = model._pos_embed(model.patch_embed(images))
    prefix, patches = tokens[:, : model.num_prefix_tokens], tokens[:, model.num_prefix_tokens :]
    rows = torch.stack([image[kept] for image, kept in zip(patches, index, strict=True)])
    return model.norm_pre(torch.cat((prefix, rows), dim=1))


def reference(model: VisionTransformer, images: Tensor, index: Tensor) -> Tensor:
    return model.forward_head(model.norm(model.blocks(kept_tokens(model, images, index))))


@every_family
def test_with_all_patches_it_equals_the_plain_timm_forward(family: str) -> None:
    model = make(family)
    images = make_images(model)
    expected = model(images)
    assert expected.std() > 0.05
    torch.testing.assert_close(forward_images(model, images).logits, expected, atol=1e-5, rtol=0)


@every_family
def test_with_a_subset_it_equals_the_model_whose_other_tokens_are_removed(family: str) -> None:
    model = make(family)
    images, index = make_images(model), some_patches(model)
    expected = reference(model, images, index)
    assert (expected - model(images)).abs().max() > 1e-2
    torch.testing.assert_close(forward_images(model, images, index).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["small-28", "dinov2-registers", "distilled", "all-norms"])
def test_attention_is_the_cls_row_of_the_last_block_averaged_over_heads(family: str) -> None:
    model = make(family)
    images, index = make_images(model), some_patches(model)
    block = model.blocks[-1]
    attn = block.attn
    tokens = block.norm1(model.blocks[:-1](kept_tokens(model, images, index)))
    expected = torch.zeros(index.shape)
    weight = attn.qkv.weight.reshape(3, attn.num_heads, -1, model.embed_dim)
    bias = attn.qkv.bias.reshape(3, attn.num_heads, -1)
    for head in range(attn.num_heads):
        q = attn.q_norm(tokens @ weight[0, head].T + bias[0, head])
        k = attn.k_norm(tokens @ weight[1, head].T + bias[1, head])
        rows = (q @ k.mT * weight.shape[2] ** -0.5).softmax(-1)
        expected += rows[:, 0, model.num_prefix_tokens :] / attn.num_heads
    output = forward_images(model, images, index, attention=True)
    assert output.attention is not None
    torch.testing.assert_close(output.attention, expected, atol=1e-6, rtol=0)


def test_attention_is_absent_unless_asked_for() -> None:
    model = make("small-28")
    assert forward_images(model, make_images(model)).attention is None


def test_the_order_of_the_patches_does_not_matter() -> None:
    model = make("small-32")
    images, index = make_images(model), some_patches(model)
    one = forward_images(model, images, index, attention=True)
    other = forward_images(model, images, index.flip(1), attention=True)
    torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=0)
    assert one.attention is not None
    assert other.attention is not None
    torch.testing.assert_close(one.attention, other.attention.flip(1), atol=1e-6, rtol=0)


def test_patches_that_are_left_out_get_no_gradient_and_the_others_that_of_the_reference() -> None:
    model = make("small-32").requires_grad_(False)
    images, index = make_images(model).requires_grad_(), some_patches(model)
    (expected,) = torch.autograd.grad(reference(model, images, index).square().sum(), images)
    (found,) = torch.autograd.grad(forward_images(model, images, index).logits.square().sum(), images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    left_out = torch.ones(3, 64, dtype=torch.bool).scatter(1, index, value=False)
    assert (patchify(found, (4, 4))[left_out] == 0).all()
    assert (patchify(found, (4, 4))[~left_out] != 0).any()


@pytest.mark.parametrize("family", ["small-28", "dinov2-registers", "deit3", "distilled", "clip-norm-pre"])
def test_gradients_of_the_weights_are_those_of_the_reference(family: str) -> None:
    model = make(family)
    images, index = make_images(model), some_patches(model)
    weights = dict(model.named_parameters())
    expected = torch.autograd.grad(reference(model, images, index).square().sum(), list(weights.values()))
    found = torch.autograd.grad(forward_images(model, images, index).logits.square().sum(), list(weights.values()))
    for key, ours, theirs in zip(weights, found, expected, strict=True):
        scale = theirs.abs().max().clamp(min=1.0)
        torch.testing.assert_close(ours / scale, theirs / scale, atol=2e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


def test_frozen_weights_get_no_gradient_while_pixels_do() -> None:
    model = make("small-28").requires_grad_(False)
    patches = patchify(make_images(model), (4, 4)).requires_grad_()
    forward_patches(model, patches, None).logits.sum().backward()
    assert patches.grad is not None
    assert all(weight.grad is None for weight in model.parameters())


def test_drop_path_drops_the_same_paths_as_timm_in_train_mode() -> None:
    model = make("small-32", drop_path_rate=0.5).train()
    images = make_images(model, 8)
    torch.manual_seed(5)
    expected = model(images)
    torch.manual_seed(5)
    torch.testing.assert_close(forward_images(model, images).logits, expected, atol=1e-5, rtol=0)
    assert (expected - model.eval()(images)).abs().max() > 1e-2


@pytest.mark.parametrize("layer", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"])
def test_dropout_works_in_train_mode_and_rests_in_eval_mode(layer: str) -> None:
    model = make("small-32", **{layer: 0.5})
    images = make_images(model)
    torch.testing.assert_close(forward_images(model, images).logits, model(images), atol=1e-5, rtol=0)
    model.train()
    assert (forward_images(model, images).logits - forward_images(model, images).logits).abs().max() > 1e-3


def test_attention_dropout_works_in_the_last_block() -> None:
    model = make("small-32", depth=1, attn_drop_rate=0.5).train()
    images = make_images(model)
    one, other = (forward_images(model, images, attention=True) for _ in range(2))
    assert (one.logits - other.logits).abs().max() > 1e-3
    torch.testing.assert_close(one.attention, other.attention, atol=0, rtol=0)


def test_patch_dropout_works_as_in_timm_but_yields_no_attention() -> None:
    model = make("small-32", patch_drop_rate=0.5).train()
    images = make_images(model)
    torch.manual_seed(5)
    expected = model(images)
    torch.manual_seed(5)
    torch.testing.assert_close(forward_images(model, images).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="patch_drop_rate"):
        forward_images(model, images, attention=True)


def test_the_last_block_works_on_the_cls_row_alone_and_only_kept_patches_are_embedded() -> None:
    model = make("small-32", depth=1)
    index = some_patches(model, kept=5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward_images(model, make_images(model), index)
    B, L, E, N, D, C = 3, 5, 48, 6, 64, 7
    keys_values, query_and_projection, mlp = N * D * 2 * D, 2 * D * D, 2 * D * 4 * D
    attention = 2 * N * D
    products = L * E * D + keys_values + query_and_projection + attention + mlp + D * C
    assert counter.get_total_flops() == 2 * B * products


def test_unpatchify_is_the_exact_inverse_of_patchify() -> None:
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, (4, 6))
    assert patches.shape == (2, 4, 72)
    assert torch.equal(unpatchify(patches, (4, 6), (2, 2)), images)
    assert torch.equal(patches[:, 1].reshape(2, 3, 4, 6), images[:, :, :4, 6:])


def test_patchify_cuts_in_the_order_of_a_convolution_weight() -> None:
    convolution = nn.Conv2d(3, 5, 4, 4, bias=False)
    images = torch.randn(2, 3, 8, 8)
    expected = convolution(images).flatten(2).mT
    found = patchify(images, (4, 4)) @ convolution.weight.flatten(1).T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_sizes_are_those_of_the_model() -> None:
    model = make("small-28")
    assert patch_size(model) == (4, 4)
    assert grid_size(model) == (7, 7)


def test_shapes_that_do_not_fit_are_refused_in_words() -> None:
    model = make("small-28")
    patches = patchify(make_images(model), (4, 4))
    with pytest.raises(ValueError, match="takes 28 x 28 pixels"):
        forward_images(model, torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="all 49 patches without an index"):
        forward_patches(model, patches[:, :5], None)
    with pytest.raises(ValueError, match=r"index of shape \(3, 4\)"):
        forward_patches(model, patches[:, :5], torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="cannot be cut into patches of 5 x 5"):
        patchify(torch.zeros(1, 1, 28, 28), (5, 5))
    with pytest.raises(ValueError, match="do not fit a grid"):
        unpatchify(patches[:, :5], (4, 4), (7, 7))


@every_family
def test_every_family_is_supported(family: str) -> None:
    check_supported(make(family))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer: its windowed attention"),
        ("samvit_base_patch16", {}, "VisionTransformerSAM: its windowed attention"),
        ("vit_small_patch16_rope_224", {}, "Eva: attention with rotary"),
        ("beit_base_patch16_224", {}, "Beit: attention with rotary or relative positions"),
        ("resnet18", {}, "must be a plain timm VisionTransformer, but is a ResNet"),
        ("vit_base_r50_s16_224", {}, "hybrid or convolutional HybridEmbed"),
        ("vit_betwixt_patch16_reg4_gap_256", {}, r"must have a \[CLS\] token"),
        ("vit_base_patch16_siglip_224", {}, r"must have a \[CLS\] token"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, r'from the \[CLS\] token .* uses the patch tokens \("avg"\)'),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, r'uses the patch tokens \("map"\)'),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "no pooling"),
        ("vit_small_patch16_18x2_224", {}, "ParallelThingsBlock is not supported"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "DiffAttention is not supported"),
        ("vit_tiny_patch16_224", {"depth": 0}, "at least one transformer block"),
        ("vit_tiny_patch16_224", {"img_size": 100}, r"image size \(100, 100\) must be divisible by patch size"),
        ("vit_tiny_patch16_224", {"norm_layer": "batchnorm1d"}, "batch and group norm mix tokens"),
    ],
)
def test_a_model_that_cannot_run_on_a_subset_is_refused_by_name_with_the_reason(
    name: str, options: dict[str, object], reason: str
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    with pytest.raises(SettingsError, match=reason) as caught:
        check_supported(model)
    assert str(caught.value).startswith(f'model.name = "{name}"')
