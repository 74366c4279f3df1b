"""Random images of coloured shapes on a plain ground, for pictures of objects."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.stages.random_images.common import valid_range

_AT_A_TIME = 128


def shapes(count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Paint one to seven coloured shapes on a plain ground, ``(count, ch, S, S)``; see `families.Family`.

    This is a variant of dead leaves (Baradad et al. 2021, "Learning to see by looking at noise", section 3.3) with an
    object in the middle: the first shape is large and near the centre, and the later shapes are smaller and lie around
    it. A shape is a stretched ellipse, rectangle or diamond with a wavy edge and a slight gradient of brightness; half
    of the shapes are rotated. Half of the images have a white ground, and the others have one of a random colour. Half
    of the images have dark outlines, as in drawings. Half of the shapes of an image have one of its three palette
    colours, and each of the others has a random colour.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    if count > _AT_A_TIME:  # limits memory: painting a shape takes a dozen planes of the images' size
        return torch.cat([shapes(len(part), grid, generator) for part in torch.empty(count).split(_AT_A_TIME)])
    size, channels, most = grid.image_size, grid.channels, 7
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    ground = torch.where(uniform(count, 1, 1, 1) < 0.5, 1.0, uniform(count, channels, 1, 1))
    images = ground.repeat(1, 1, size, size)
    number = torch.randint(1, most + 1, (count, 1, 1), generator=generator)
    outlined = uniform(count, 1, 1) < 0.5
    palette = uniform(count, 3, channels)
    for turn in range(most):
        radius = 0.35 + 0.6 * uniform(count, 1, 1) if turn == 0 else 0.05 + 0.4 * uniform(count, 1, 1)
        stretch = (0.25 * torch.randn(count, 1, 1, generator=generator)).exp().clamp(0.6, 1.7)
        spread = 0.12 if turn == 0 else 0.45
        right, down = spread * torch.randn(2, count, 1, 1, generator=generator)
        angle = math.pi * uniform(count, 1, 1) * (uniform(count, 1, 1) < 0.5)
        across = (x - right) * angle.cos() + (y - down) * angle.sin()
        along = (y - down) * angle.cos() - (x - right) * angle.sin()
        power = torch.tensor([1.0, 2.0, 2.0, 8.0])[torch.randint(4, (count, 1, 1), generator=generator)]
        scaled = (across / (radius * stretch)).abs() ** power + (along * stretch / radius).abs() ** power
        waves = torch.randint(2, 8, (count, 1, 1), generator=generator)
        wavy = 1 + 0.15 * uniform(count, 1, 1) * torch.sin(waves * torch.atan2(along, across))
        # Approximate distance to the edge in pixels, positive inside: that of a circle with the smaller radius.
        depth = (1 - scaled ** (1 / power) * wavy) * radius * torch.minimum(stretch, 1 / stretch) * size / 2
        painted = turn < number
        inside = ((depth + 0.5).clamp(0, 1) * painted)[:, None]
        edge = (((depth + 0.5).clamp(0, 1) - (depth - 1).clamp(0, 1)) * outlined * painted)[:, None]
        own = palette[torch.arange(count), torch.randint(3, (count,), generator=generator)][..., None, None]
        colour = torch.where(uniform(count, 1, 1, 1) < 0.5, uniform(count, channels, 1, 1), own)
        shade = 1 + 0.3 * (uniform(count, 1, 1, 1) - 0.5) * (x + y)
        images = images.lerp((colour * shade).clamp(0, 1), inside).lerp(torch.full_like(images, 0.1), edge)
    low, high = valid_range(grid)
    return low + (high - low) * images
