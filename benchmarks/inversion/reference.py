"""Plain reference for sparse inversion, written as research code is, with exactly the mathematics of our engine.

- Every image is embedded whole, and then the kept patches are gathered.
- Every block computes every token, with explicit attention.
- Total variation goes through autograd, and the teachers' weights keep their gradients.
- torch's Adam updates whole images; afterwards the stopped patches are restored.

Benchmarks measure our engine against it, and tests compare losses and gradients with it.

Letters: B images, K teachers, C classes, P patches of the full grid, L patches kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import InversionSettings


class PlainInversion:
    """One batch of images under inversion.

    Parameters
    ----------
    teachers
        K plain timm ViTs.
    weights
        ``(K, C)`` class-wise weights, all positive.
    images
        ``(B, ch, S, S)`` starting images, on the device of the teachers, weights, labels and kept patches.
    labels
        ``(B,)`` int64.
    kept
        ``(B, L)`` int64 indices of the patches that are inverted; None: all patches, which is dense inversion.
    dtype
        With bf16, the forward pass runs under autocast.
    """

    def __init__(
        self,
        teachers: Sequence[VisionTransformer],
        weights: Tensor,
        images: Tensor,
        labels: Tensor,
        kept: Tensor | None,
        grid: PatchGrid,
        settings: InversionSettings,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.teachers, self.weights, self.labels = teachers, weights, labels
        self.kept, self.grid, self.settings, self.dtype = kept, grid, settings, dtype
        self.images = images.clone().requires_grad_(True)
        self.frozen = images.clone()
        self.low, self.high = grid.low.to(images.device)[:, None, None], grid.high.to(images.device)[:, None, None]
        mask = torch.ones(len(images), grid.num_patches, dtype=torch.bool, device=images.device)
        if kept is not None:
            mask = torch.zeros_like(mask).scatter(1, kept, True)
        patch_pixels = grid.channels * grid.patch[0] * grid.patch[1]
        self.mask = grid.to_images(mask[..., None].expand(-1, -1, patch_pixels))
        self.adam = torch.optim.Adam(
            [self.images], lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=1e-8
        )
        for teacher in teachers:
            teacher.eval().requires_grad_(True)
            for block in teacher.blocks:
                setattr(cast(Block, block).attn, "fused_attn", False)  # noqa: B010 - timm declares it final

    def logits(self, teacher: VisionTransformer) -> Tensor:
        """Return the ``(B, C)`` logits of a teacher from [CLS] and the kept patches."""
        tokens = teacher._pos_embed(teacher.patch_embed(self.images))
        if self.kept is not None:
            prefix = teacher.num_prefix_tokens
            patches = tokens[:, prefix:].gather(1, self.kept[..., None].expand(-1, -1, tokens.shape[-1]))
            tokens = torch.cat([tokens[:, :prefix], patches], dim=1)
        for block in teacher.blocks:
            tokens = block(tokens)
        logits: Tensor = teacher.forward_head(teacher.norm(tokens))
        return logits

    def cross_entropy(self) -> Tensor:
        """Return CE(A(x), y) of each image, ``(B,)``."""
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = [self.logits(teacher) for teacher in self.teachers]
        total = torch.zeros((), device=self.images.device)
        for weight, out in zip(self.weights, logits, strict=True):
            total = total + weight * out.float().softmax(-1)
        probabilities = total / total.sum(-1, keepdim=True)
        return -probabilities.gather(1, self.labels[:, None]).squeeze(1).log()

    def total_variation(self) -> Tensor:
        """Return DeepInversion's total variation of each image, ``(B,)``."""
        x = self.images
        differences = (
            x[..., :, 1:] - x[..., :, :-1],
            x[..., 1:, :] - x[..., :-1, :],
            x[..., 1:, 1:] - x[..., :-1, :-1],
            x[..., 1:, :-1] - x[..., :-1, 1:],
        )
        return torch.stack([d.flatten(1).norm(dim=1) for d in differences]).sum(0)

    def step(self) -> Tensor:
        """Run one iteration; return the ``(B,)`` cross-entropies before its update."""
        self.adam.zero_grad()
        for teacher in self.teachers:
            teacher.zero_grad(set_to_none=True)
        loss = self.cross_entropy()
        prior = self.settings.tv_weight * self.total_variation()
        (loss + prior).sum().backward()
        self.adam.step()
        with torch.no_grad():
            clipped = torch.minimum(torch.maximum(self.images, self.low), self.high)
            self.images.copy_(torch.where(self.mask, clipped, self.frozen))
        return loss.detach()
