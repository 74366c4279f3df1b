"""Floating-point operations of one image through one teacher as the engine runs it."""

from __future__ import annotations

from typing import cast

from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer

from fedmitr_flwr.ensemble.engine.packing import architecture_of
from fedmitr_flwr.models.flops import count_flops
from fedmitr_flwr.models.patch_grid import PatchGrid


def pass_flops(model: VisionTransformer, grid: PatchGrid, patches: int) -> int:
    """FLOPs of the forward and backward pass of one image through one teacher under inversion, as `passes.py` does it.

    The matrix products of all blocks but the last for all tokens; of the last one those that the head reads. Of a
    model that runs by autograd: two forward passes and the way back.

    Parameters
    ----------
    patches
        L.
    """
    architecture = architecture_of(model)
    if architecture is None:
        return count_flops(model, grid, patches) + count_flops(model, grid, patches, pixel_gradient=True)
    D, E, N = model.embed_dim, model.patch_embed.proj.weight[0].numel(), patches + model.num_prefix_tokens
    hidden = cast(int, cast(Mlp, cast(Block, model.blocks[0]).mlp).fc1.out_features)
    Q = 2 if architecture.distilled else 1
    block = N * 2 * 2 * (4 * D * D + 2 * D * hidden) + 12 * N * N * D
    last = Q * 2 * 2 * (4 * D * D + 2 * D * hidden) + 12 * architecture.heads * Q * N * D
    head = 2 * 2 * model.num_classes * Q * D
    total: int = block * (len(model.blocks) - 1) + last + head + 2 * 2 * patches * D * E
    return total
