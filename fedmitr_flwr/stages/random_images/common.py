"""What the families of random images share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.models.patch_grid import PatchGrid


def enlarged(
    count: int, channels: int, size: int, sides: range | list[int], mode: str, generator: torch.Generator
) -> Tensor:
    """Gaussian noise on grids of random sides, enlarged; ``(count, channels, size, size)``."""
    which = torch.randint(len(sides), (count,), generator=generator)
    images = torch.empty(count, channels, size, size)
    for number, side in enumerate(sides):
        rows = (which == number).nonzero().squeeze(1)
        cells = torch.randn(len(rows), channels, side, side, generator=generator)
        if len(rows):
            images[rows] = F.interpolate(cells, size=(size, size), mode=mode, align_corners=False)
    return images


def valid_range(grid: PatchGrid) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest valid values, ``(ch, 1, 1)`` each, on the CPU."""
    return grid.low.cpu()[:, None, None], grid.high.cpu()[:, None, None]
