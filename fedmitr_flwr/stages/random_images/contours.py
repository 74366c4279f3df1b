"""Random images of bright lines on a dark ground, for writing."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.stages.random_images.common import enlarged, valid_range


def contours(count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Draw bright lines on a dark ground, ``(count, ch, S, S)``; see `families.Family`.

    The line of an image is a level line of a smooth random field, interrupted where a second such field is low. The
    first field has 2 to 6 cells a side. The line is S/23 to S/6 wide, and its edges fade over about S/28.
    """
    size = grid.image_size
    unit = size / 28
    field = enlarged(count, 1, size, range(2, 7), "bicubic", generator)
    gaps = enlarged(count, 1, size, range(2, 5), "bicubic", generator)
    level = 0.5 * torch.randn(count, 1, 1, 1, generator=generator)
    half_width = unit * (0.6 + 1.6 * torch.rand(count, 1, 1, 1, generator=generator))
    down, right = torch.gradient(field, dim=(2, 3))
    slope = (down**2 + right**2).sqrt().clamp_min(0.05 / unit)
    distance = (field - level).abs() / slope
    line = torch.sigmoid(2.5 * (half_width - distance) / unit) * torch.sigmoid(6.0 * (gaps + 0.3))
    low, high = valid_range(grid)
    return low + (high - low) * line
