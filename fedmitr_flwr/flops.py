"""Floating-point operations of a run's stages, counted on one image and multiplied out.

Letters: K teachers, P patches of the full grid, L patches kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import cast

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedmitr_flwr.centring import growth
from fedmitr_flwr.grid import PatchGrid
from fedmitr_flwr.packed import architecture_of
from fedmitr_flwr.schedule import most_attended, patches_left
from fedmitr_flwr.settings import InversionSettings, Settings
from fedmitr_flwr.vit import forward_patches


def count_flops(model: VisionTransformer, grid: PatchGrid, patches: int, *, pixel_gradient: bool = False) -> int:
    """FLOPs of one image through one model, a multiplication and an addition counted as two.

    Parameters
    ----------
    model
        Its weights are not changed and get no gradient.
    patches
        L, how many patches go in; the count depends on nothing else.
    pixel_gradient
        Whether to count the way back to the pixels as well.
    """
    weight = next(model.parameters())
    pixels = torch.zeros(1, patches, grid.channels * grid.patch[0] * grid.patch[1], device=weight.device)
    pixels.requires_grad_(pixel_gradient)
    index = torch.arange(patches, device=weight.device)[None]
    training, wanted = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(pixel_gradient):
            logits = forward_patches(model, pixels, index).logits
            if pixel_gradient:
                torch.autograd.grad(logits.sum(), pixels)
    finally:
        model.train(training)
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
    return int(counter.get_total_flops())


def pass_flops(model: VisionTransformer, grid: PatchGrid, patches: int) -> int:
    """FLOPs of the forward and backward pass of one image through one teacher under inversion, as `engine.py` does it.

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


def kept_schedule(
    settings: InversionSettings, patches: int, grown: Mapping[int, Tensor] | None = None
) -> list[tuple[int, int]]:
    """``(iterations, L)`` of each span between two stops; the iteration of a stop still sees the patches before it.

    Parameters
    ----------
    patches
        P.
    grown
        Of `centring.growth`, the patches that are there from an iteration on; None: all from the start.
    """
    steps = sorted((grown or {}).items())
    spans = [(after - before, len(there)) for (before, there), (after, _) in pairwise(steps)]
    start, kept = steps[-1][0] if steps else 0, patches
    size = patches_left(patches, settings)
    for number, (stop, fraction) in enumerate(zip(settings.stops, settings.fractions, strict=True), 1):
        spans.append((stop + 1 - start, kept))
        start, kept = stop + 1, most_attended(torch.zeros(1, kept), fraction).shape[1]
        if settings.method == "rebirth":
            kept = size if number == len(settings.stops) else patches - number * size
    spans.append((settings.iterations - start, kept))
    return [(length, number) for length, number in spans if length > 0]


def stage_flops(settings: Settings, model: VisionTransformer, grid: PatchGrid, teachers: int) -> dict[str, float]:
    """Estimate the FLOPs of the server's stages from the settings.

    Inversion counts forward and pixel gradients of all K teachers; ``invert_dense`` is what it would take without
    stopping any patch. Distillation counts K labels for each image of the pool once, and three forwards for each image
    of each step, and the inversion of hard images; the low-density term is left out.
    """
    P, inversion, distill = grid.num_patches, settings.inversion, settings.distill
    spans = kept_schedule(inversion, P, growth(grid, inversion.centring))
    cost = {L: count_flops(model, grid, L, pixel_gradient=True) for L in {L for _, L in spans} | {P}}
    forward = count_flops(model, grid, P)
    images = inversion.runs * inversion.images_per_run
    run = inversion.copies * sum(length * cost[L] for length, L in spans)
    hard = distill.adversarial_rounds * -(-distill.adversarial_images // inversion.images_per_run)
    pool = images * (distill.views + distill.mix + distill.noise) + hard * inversion.images_per_run * distill.views
    return {
        "invert": float(inversion.runs * teachers * run),
        "invert_dense": float(inversion.runs * teachers * inversion.copies * inversion.iterations * cost[P]),
        "relabel": float(2 * images * teachers * forward),
        "distill": float(
            forward * (pool * teachers + 3 * distill.steps * distill.batch_size) + hard * (teachers + 1) * run
        ),
    }
