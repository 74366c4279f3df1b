"""Count the floating-point operations that the engine needs for one image and one teacher."""

from __future__ import annotations

from typing import cast

from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer

from fedmitr_flwr.ensemble.engine.packing import architecture_of
from fedmitr_flwr.models.flops import count_flops
from fedmitr_flwr.models.patch_grid import PatchGrid


def pass_flops(model: VisionTransformer, grid: PatchGrid, patches: int) -> int:
    """Return the FLOPs of one image's forward and backward pass through one teacher, as `passes.py` runs them.

    Only matrix products are counted. All tokens count in all blocks but the last; in the last block only the rows that
    the head reads count. A teacher that cannot be packed runs by autograd and costs two forward passes and one backward
    pass.

    Parameters
    ----------
    patches
        L, the number of patches in the sequence.
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
