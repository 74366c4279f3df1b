"""The families of random images, chosen by `distill.noise-kind` and `inversion.start`.

Distilling an ensemble on random images is a strong baseline and a useful addition to inverted ones. Which family is
best depends on the data: the nearer its statistics are to real images, the more of the ensemble's knowledge it draws
out, and the more it assumes. `fields` assumes nothing, `contours` bright lines on a dark ground, `shapes` objects on a
ground.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.stages.random_images.contours import contours
from fedmitr_flwr.stages.random_images.fields import fields
from fedmitr_flwr.stages.random_images.shapes import shapes


class Family(Protocol):
    """A family of random images."""

    def __call__(self, count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
        """Return ``(count, ch, S, S)`` fp32 images on the CPU within the grid's valid range."""


FAMILIES: dict[str, Family] = {"fields": fields, "contours": contours, "shapes": shapes}
"""By name, in the order of `settings.choices.RandomFamily`."""


def random_images(kind: str, count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Return random images of one family.

    Parameters
    ----------
    kind
        A key of `FAMILIES`.
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
    return FAMILIES[kind](count, grid, generator)
