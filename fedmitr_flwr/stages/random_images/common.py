"""Functions that several families of random images use."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.models.patch_grid import PatchGrid


def enlarged(
    count: int, channels: int, size: int, sides: range | list[int], mode: str, generator: torch.Generator
) -> Tensor:
    """Return Gaussian noise on grids of random side lengths, enlarged to ``(count, channels, size, size)``.

    Parameters
    ----------
    count, channels, size
        Number of images, channels, and side of an image in pixels.
    sides
        Side lengths of the grids. Each image has one of them, drawn uniformly.
    mode
        Interpolation mode of `torch.nn.functional.interpolate`.
    generator
        CPU generator.
    """
    which = torch.randint(len(sides), (count,), generator=generator)
    images = torch.empty(count, channels, size, size)
    for number, side in enumerate(sides):
        rows = (which == number).nonzero().squeeze(1)
        cells = torch.randn(len(rows), channels, side, side, generator=generator)
        if len(rows):
            images[rows] = F.interpolate(cells, size=(size, size), mode=mode, align_corners=False)
    return images


def valid_range(grid: PatchGrid) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest valid pixel values, ``(ch, 1, 1)`` each, on the CPU."""
    return grid.low.cpu()[:, None, None], grid.high.cpu()[:, None, None]
