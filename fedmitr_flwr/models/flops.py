"""Count the floating-point operations of one image through one model."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_patches


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
