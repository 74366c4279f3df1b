"""The families of random images that `distill.noise-kind` and `inversion.start` can name.

Distillation on random images is a strong baseline and a useful addition to inverted images. Which family is best
depends on the data. The closer the statistics of the random images are to those of real images, the more the student
learns from the ensemble, but the more the family assumes about the data. `fields` assumes nothing; `contours` assumes
bright lines on a dark ground; `shapes` assumes objects on a plain ground.
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
    """Signature of a function that draws random images of one family."""

    def __call__(self, count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
        """Return ``(count, ch, S, S)`` fp32 images on the CPU, within the grid's valid range."""


FAMILIES: dict[str, Family] = {"fields": fields, "contours": contours, "shapes": shapes}
"""Families by name, in the order of `settings.choices.RandomFamily`."""


def random_images(kind: str, count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Return random images of one family.

    Parameters
    ----------
    kind
        A key of `FAMILIES`.
    count
        Number of images.
    grid
        Geometry and valid pixel range.
    generator
        CPU generator.

    Returns
    -------
    Tensor
        ``(count, ch, S, S)`` fp32 on the CPU.
    """
    return FAMILIES[kind](count, grid, generator)
