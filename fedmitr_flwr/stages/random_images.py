"""Random images without any meaning, for the ensemble to label or to start inversion from.

Distilling an ensemble on random images is a strong baseline and a useful addition to inverted ones. Which kind is
best depends on the data: the nearer its statistics are to real images, the more of the ensemble's knowledge it asks
for, and the more it assumes. `contours` assumes bright lines on a dark ground, as in writing; `shapes` assumes things
that lie before each other on a ground; `fields` assumes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import RandomFamily

_AT_A_TIME = 128


def random_images(kind: RandomFamily, count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Random images of one kind, within the valid pixel range.

    Parameters
    ----------
    kind
        `fields`, `contours` or `shapes`, the functions below.
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
    return {"fields": fields, "contours": contours, "shapes": shapes}[kind](count, grid, generator)


def fields(count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Noise of random coarseness, contrast and mean.

    Each image is Gaussian noise on a grid of S/7 to S cells a side, enlarged to the full size. Its contrast is uniform
    between 0.5 and 2.5 and its mean between -1 and 1, in units of the normalised pixels. Two images of three get white
    noise of a standard deviation up to 1.5 on top: an ensemble says more of rough images than of smooth ones.
    """
    size = grid.image_size
    sides = sorted({max(2, size // 7), max(2, size // 4), max(2, size // 2), size})
    images = _enlarged(count, grid.channels, size, sides, "bilinear", generator)
    draw = torch.rand(3, count, 1, 1, 1, generator=generator)
    roughness = (2.25 * draw[2] - 0.75).clamp_min(0.0)
    images = images * (0.5 + 2.0 * draw[0]) + (2.0 * draw[1] - 1.0)
    images = images + roughness * torch.randn(images.shape, generator=generator)
    low, high = _range(grid)
    return torch.minimum(torch.maximum(images, low), high)


def contours(count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Bright lines on a dark ground: a level line of a smooth random field, interrupted by a second one.

    The field has 2 to 6 cells a side; the line is S/23 to S/6 wide, and its edges fall off over about S/28.
    """
    size = grid.image_size
    unit = size / 28
    field = _enlarged(count, 1, size, range(2, 7), "bicubic", generator)
    gaps = _enlarged(count, 1, size, range(2, 5), "bicubic", generator)
    level = 0.5 * torch.randn(count, 1, 1, 1, generator=generator)
    half_width = unit * (0.6 + 1.6 * torch.rand(count, 1, 1, 1, generator=generator))
    down, right = torch.gradient(field, dim=(2, 3))
    slope = (down**2 + right**2).sqrt().clamp_min(0.05 / unit)
    distance = (field - level).abs() / slope
    line = torch.sigmoid(2.5 * (half_width - distance) / unit) * torch.sigmoid(6.0 * (gaps + 0.3))
    low, high = _range(grid)
    return low + (high - low) * line


def shapes(count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """One to seven coloured shapes, painted one over another on a plain ground.

    A kind of dead leaves (Baradad et al. 2021, "Learning to see by looking at noise", section 3.3), but with a thing in
    the middle: the first shape is large and near the centre, later ones are smaller and lie around it. A shape is an
    ellipse, a rectangle or a diamond, stretched, half of them turned, with a wavy edge and a light fall of brightness.
    Half of the images have a white ground, the others one of any colour; half have dark outlines, as in drawings.
    Half of an image's shapes have one of its three colours, the others each their own.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    if count > _AT_A_TIME:  # a shape has a dozen planes of the images' size
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
        # Distance to the edge in pixels, positive inside, as on a circle of the shape's smaller radius.
        depth = (1 - scaled ** (1 / power) * wavy) * radius * torch.minimum(stretch, 1 / stretch) * size / 2
        painted = turn < number
        inside = ((depth + 0.5).clamp(0, 1) * painted)[:, None]
        edge = (((depth + 0.5).clamp(0, 1) - (depth - 1).clamp(0, 1)) * outlined * painted)[:, None]
        own = palette[torch.arange(count), torch.randint(3, (count,), generator=generator)][..., None, None]
        colour = torch.where(uniform(count, 1, 1, 1) < 0.5, uniform(count, channels, 1, 1), own)
        shade = 1 + 0.3 * (uniform(count, 1, 1, 1) - 0.5) * (x + y)
        images = images.lerp((colour * shade).clamp(0, 1), inside).lerp(torch.full_like(images, 0.1), edge)
    low, high = _range(grid)
    return low + (high - low) * images


def _enlarged(
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


def _range(grid: PatchGrid) -> tuple[Tensor, Tensor]:
    return grid.low.cpu()[:, None, None], grid.high.cpu()[:, None, None]
