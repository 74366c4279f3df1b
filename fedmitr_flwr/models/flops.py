"""Count the floating-point operations of one image through one model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_tokens, forward_trunk


def count_flops(model: VisionTransformer, grid: PatchGrid, patches: int, *, pixel_gradient: bool = False) -> int:
    """Return the FLOPs of one image through one model; a multiplication and an addition count as two.

    Parameters
    ----------
    model
        The model. Its weights do not change and get no gradient.
    grid
        Geometry of the patches.
    patches
        Number of patches L in the input.
    pixel_gradient
        Whether to include the backward pass to the pixels.
    """
    return sum(count_parts(model, grid, patches, 0, pixel_gradient=pixel_gradient))


def count_parts(
    model: VisionTransformer, grid: PatchGrid, patches: int, depth: int, *, pixel_gradient: bool = False
) -> tuple[int, int]:
    """Return the FLOPs of one image through the first `depth` blocks of a model, and through the rest of it.

    The patch embedding belongs to the first part.

    Parameters
    ----------
    model, grid, patches, pixel_gradient
        As for `count_flops`.
    depth
        Number of blocks, 0 to all.
    """
    weight = next(model.parameters())
    pixels = torch.zeros(1, patches, grid.channels * grid.patch[0] * grid.patch[1], device=weight.device)
    index = torch.arange(patches, device=weight.device)[None]
    training, wanted = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            tokens = forward_trunk(model, pixels, index, depth).tokens
        return (
            _flops(lambda x: forward_trunk(model, x, index, depth).tokens, pixels, pixel_gradient),
            _flops(lambda x: forward_tokens(model, x, depth).logits, tokens, pixel_gradient),
        )
    finally:
        model.train(training)
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)


def _flops(part: Callable[[Tensor], Tensor], x: Tensor, gradient: bool) -> int:
    """Return the FLOPs of a function, with the backward pass to its input if `gradient` is true."""
    x = x.detach().requires_grad_(gradient)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
        out = part(x.view_as(x))  # the counter does not work on modules whose input is a leaf of the graph
        if gradient:
            torch.autograd.grad(out.sum(), x)
    return int(counter.get_total_flops())
