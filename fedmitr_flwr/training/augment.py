"""Random image augmentation on batches of normalised tensors, for clients and for distillation.

All random numbers come from an explicit generator, so that a run repeats bit for bit. torchvision's transforms draw
from the global generator and process one image at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.settings import Augmentation


def augment(images: Tensor, kind: Augmentation, generator: torch.Generator) -> Tensor:
    """Augment each image of a batch at random.

    Parameters
    ----------
    images
        ``(B, ch, S, S)`` float.
    kind
        ``none``: unchanged. ``shift``: shift by whole pixels, up to 1/14 of the side in each direction, with border
        pixels repeated. ``flip``: shift, and mirror left to right with probability 0.5. ``strong``: zoom by a factor
        from 0.7 to 1.3, shift by up to 1/7 of the side, mirror, and change brightness and contrast by up to a fifth.
    generator
        CPU generator.

    Returns
    -------
    Tensor
        ``(B, ch, S, S)`` with the dtype and device of `images`.
    """
    if kind == "none":
        return images
    if kind == "strong":
        return _strong(images, generator)
    out = _shift(images, max(1, images.shape[-1] // 14), generator)
    if kind == "flip":
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        out = torch.where(mirrored.to(out.device)[:, None, None, None], out.flip(-1), out)
    return out


def _shift(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    B, ch, H, W = images.shape
    dy, dx = torch.randint(-reach, reach + 1, (2, B, 1), generator=generator)
    rows = (torch.arange(H) + dy).clamp_(0, H - 1).to(images.device)
    columns = (torch.arange(W) + dx).clamp_(0, W - 1).to(images.device)
    out = images.gather(2, rows[:, None, :, None].expand(B, ch, H, W))
    return out.gather(3, columns[:, None, None, :].expand(B, ch, H, W))


def _strong(images: Tensor, generator: torch.Generator) -> Tensor:
    B = len(images)
    draw = torch.rand(6, B, generator=generator).to(images.device, images.dtype)
    zoom = 0.7 + 0.6 * draw[0]
    mirror = torch.where(draw[1] < 0.5, -1.0, 1.0).to(images.dtype)
    zero = torch.zeros_like(zoom)
    rows = [
        torch.stack([zoom * mirror, zero, (draw[2] - 0.5) * 4 / 7], 1),
        torch.stack([zero, zoom, (draw[3] - 0.5) * 4 / 7], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    out = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = (0.8 + 0.4 * draw[4])[:, None, None, None]
    brightness = (0.4 * (draw[5] - 0.5))[:, None, None, None]
    return out * contrast + brightness
