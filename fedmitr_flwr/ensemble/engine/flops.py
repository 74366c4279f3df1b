"""Count the floating-point operations that the engine needs for one image."""

from __future__ import annotations

from typing import cast

from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer

from fedmitr_flwr.ensemble.engine.packing import architecture_of
from fedmitr_flwr.models.flops import count_parts
from fedmitr_flwr.models.patch_grid import PatchGrid


def pass_flops(model: VisionTransformer, grid: PatchGrid, patches: int, teachers: int = 1, depth: int = 0) -> int:
    """Return the FLOPs of one image's forward and backward pass through teachers, as `passes.py` runs them.

    Only matrix products are counted. All tokens count in all blocks but the last; in the last block only the rows that
    the head reads count. A teacher that cannot be packed runs by autograd and costs two forward passes and one backward
    pass.

    Parameters
    ----------
    model
        One of the teachers.
    patches
        L, the number of patches in the sequence.
    teachers
        K.
    depth
        Number of leading blocks that all teachers share. They run once, and so does the patch embedding. 0: none.
    """
    architecture, n = architecture_of(model), len(model.blocks)
    if architecture is None:
        ways = (count_parts(model, grid, patches, depth, pixel_gradient=way) for way in (False, True))
        trunk, tail = (sum(parts) for parts in zip(*ways, strict=True))
    else:
        D, E, N = model.embed_dim, model.patch_embed.proj.weight[0].numel(), patches + model.num_prefix_tokens
        hidden = cast(int, cast(Mlp, cast(Block, model.blocks[0]).mlp).fc1.out_features)
        Q = architecture.rows
        block = N * 2 * 2 * (4 * D * D + 2 * D * hidden) + 12 * N * N * D
        last = Q * 2 * 2 * (4 * D * D + 2 * D * hidden) + 12 * architecture.heads * Q * N * D
        before = min(depth, n - 1)
        trunk = block * before + (last if depth == n else 0) + 2 * 2 * patches * D * E
        tail = block * (n - 1 - before) + (last if depth < n else 0) + 2 * 2 * model.num_classes * Q * D
    total: int = (trunk if depth else trunk * teachers) + tail * teachers
    return total
