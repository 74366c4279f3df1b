"""Random images of smooth and rough noise, for any data."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.stages.random_images.common import enlarged, valid_range


def fields(count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Draw noise of random coarseness, contrast and mean, ``(count, ch, S, S)``; see `families.Family`.

    Each image is Gaussian noise on a grid of S/7 to S cells a side, enlarged to the full size. Its contrast is uniform
    between 0.5 and 2.5 and its mean between -1 and 1, in units of normalised pixels. On average two of three images get
    additional white noise with a standard deviation of up to 1.5, because the ensemble's outputs on rough images carry
    more information than those on smooth ones.
    """
    size = grid.image_size
    sides = sorted({max(2, size // 7), max(2, size // 4), max(2, size // 2), size})
    images = enlarged(count, grid.channels, size, sides, "bilinear", generator)
    draw = torch.rand(3, count, 1, 1, 1, generator=generator)
    roughness = (2.25 * draw[2] - 0.75).clamp_min(0.0)
    images = images * (0.5 + 2.0 * draw[0]) + (2.0 * draw[1] - 1.0)
    images = images + roughness * torch.randn(images.shape, generator=generator)
    low, high = valid_range(grid)
    return torch.minimum(torch.maximum(images, low), high)
