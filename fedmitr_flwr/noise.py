"""Smooth random images, without any meaning, for the ensemble to label.

Distilling an ensemble on noise is a strong baseline and a useful addition to inverted images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.grid import PatchGrid


def smooth_noise(count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Noise of random coarseness, contrast and mean, clipped to the valid pixel range.

    Each image is Gaussian noise on a grid of 4 to S cells a side, enlarged to the full size. Its contrast is uniform
    between 0.5 and 2.5 and its mean between -1 and 1, in units of the normalised pixels.

    Parameters
    ----------
    count
        B.
    grid
        Geometry and valid range.
    generator
        CPU generator.

    Returns
    -------
    Tensor
        ``(B, ch, S, S)`` fp32 on the CPU.
    """
    size = grid.image_size
    sides = sorted({max(2, size // 7), max(2, size // 4), max(2, size // 2), size})
    which = torch.randint(len(sides), (count,), generator=generator)
    images = torch.empty(count, grid.channels, size, size)
    for number, side in enumerate(sides):
        rows = (which == number).nonzero().squeeze(1)
        cells = torch.randn(len(rows), grid.channels, side, side, generator=generator)
        if len(rows):
            images[rows] = F.interpolate(cells, size=(size, size), mode="bilinear", align_corners=False)
    draw = torch.rand(2, count, 1, 1, 1, generator=generator)
    images = images * (0.5 + 2.0 * draw[0]) + (2.0 * draw[1] - 1.0)
    low, high = grid.low.cpu()[:, None, None], grid.high.cpu()[:, None, None]
    return torch.minimum(torch.maximum(images, low), high)
