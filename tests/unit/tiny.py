"""Tiny models and images for unit tests, and plain re-computations to compare with."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.patch_grid import PatchGrid

CLASSES, SIZE, PATCH = 5, 16, 4


def tiny_vit(seed: int = 0, channels: int = 1, depth: int = 2) -> nn.Module:
    """A ViT of 16 patches whose weights are large enough for its outputs to differ between images."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=PATCH,
        in_chans=channels,
        embed_dim=24,
        depth=depth,
        num_heads=3,
        num_classes=CLASSES,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.25, generator=generator)
    return model.eval()


def tiny_ensemble(K: int = 3, seed: int = 0) -> Ensemble:
    generator = torch.Generator().manual_seed(100 + seed)
    weights = torch.rand(K, CLASSES, generator=generator)
    return Ensemble([tiny_vit(seed + k) for k in range(K)], weights / weights.sum(0))


def tiny_grid(channels: int = 1) -> PatchGrid:
    return PatchGrid(channels, SIZE, (PATCH, PATCH), torch.full((channels,), -1.0), torch.full((channels,), 2.0))


def plain_subset_logits(model: nn.Module, images: Tensor, index: Tensor) -> Tensor:
    """The full timm model with the other tokens removed after the position embedding."""
    tokens = model._pos_embed(model.patch_embed(images))
    chosen = torch.cat([torch.zeros(len(index), 1, dtype=torch.int64), index + 1], 1)
    tokens = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
    return model.forward_head(model.norm(model.blocks(model.norm_pre(tokens))))


def plain_ensemble(ensemble: Ensemble, images: Tensor, index: Tensor | None = None) -> Tensor:
    """A(x) by the formula, teacher by teacher and class by class."""
    B, C = len(images), ensemble.weights.shape[1]
    out = torch.zeros(B, C)
    for k, teacher in enumerate(ensemble.teachers):
        logits = teacher(images) if index is None else plain_subset_logits(teacher, images, index)
        p = logits.softmax(-1)
        for c in range(C):
            out[:, c] = out[:, c] + ensemble.weights[k, c] * p[:, c]
    return out / out.sum(1, keepdim=True)
