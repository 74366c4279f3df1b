"""Random images without any meaning, for the ensemble to label or to start inversion from.

Distilling an ensemble on noise is a strong baseline and a useful addition to inverted images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.grid import PatchGrid


def smooth_noise(count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Noise of random coarseness, contrast and mean, clipped to the valid pixel range.

    Each image is Gaussian noise on a grid of S/7 to S cells a side, enlarged to the full size. Its contrast is uniform
    between 0.5 and 2.5 and its mean between -1 and 1, in units of the normalised pixels. Two images of three get white
    noise of a standard deviation up to 1.5 on top: an ensemble says more of rough images than of smooth ones.

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
    draw = torch.rand(3, count, 1, 1, 1, generator=generator)
    roughness = (2.25 * draw[2] - 0.75).clamp_min(0.0)
    images = images * (0.5 + 2.0 * draw[0]) + (2.0 * draw[1] - 1.0)
    images = images + roughness * torch.randn(images.shape, generator=generator)
    low, high = grid.low.cpu()[:, None, None], grid.high.cpu()[:, None, None]
    return torch.minimum(torch.maximum(images, low), high)
