"""Stage 2: split the patches of each synthetic image by information density.

The density of a patch is the [CLS] attention to it in the last block, mean over the heads and weighted mean over the
teachers.

Letters: B images, P patches of the full grid, L patches kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmitr_flwr.settings import DensitySettings


@dataclass(frozen=True)
class PatchSplit:
    """Division of each image's patches into high and low density.

    Attributes
    ----------
    high
        ``(B, P)`` bool, True for high density; at least one in each image.
    """

    high: Tensor

    @property
    def low(self) -> Tensor:
        """``(B, P)`` bool, True for low density."""
        return ~self.high

    def __getitem__(self, rows: Tensor) -> PatchSplit:
        return PatchSplit(self.high[rows])


def split_patches(kept: Tensor, density: Tensor, settings: DensitySettings) -> PatchSplit:
    """Split the patches of each image by `density.rule`.

    Parameters
    ----------
    kept
        ``(B, L)`` int64, the patches that were inverted to the end.
    density
        ``(B, P)`` attention over the full grid.
    settings
        What counts as high density. ``survival``: the kept patches, as in the paper; ``quantile``: the same number of
        the densest patches in every image; ``mass``: the fewest patches that together hold `density.mass` of the
        attention; ``otsu``: the patches above an automatic threshold for each image, which the paper names as future
        work.
    """
    B, P = density.shape
    if settings.rule == "survival":
        return PatchSplit(torch.zeros(B, P, dtype=torch.bool, device=density.device).scatter(1, kept, True))
    order = density.sort(dim=1, descending=True, stable=True)
    rank = order.indices.argsort(dim=1)
    if settings.rule == "quantile":
        count = torch.full((B, 1), max(1, round(P * (1 - settings.quantile))), device=density.device)
    elif settings.rule == "mass":
        before = order.values.cumsum(1) - order.values
        count = (before < settings.mass * order.values.sum(1, keepdim=True)).sum(1, keepdim=True).clamp_min(1)
    else:
        count = otsu_count(order.values)
    return PatchSplit(rank < count)


def otsu_count(density: Tensor) -> Tensor:
    """Count the patches above Otsu's threshold (Otsu 1979), without binning the values.

    Parameters
    ----------
    density
        ``(B, P)`` sorted in descending order.

    Returns
    -------
    Tensor
        ``(B, 1)`` int64 between 1 and P - 1: the split with the largest variance between the two groups. P for an
        image whose patches all have the same density, or that has one patch.
    """
    B, P = density.shape
    if P == 1:
        return torch.ones(B, 1, dtype=torch.int64, device=density.device)
    number = torch.arange(1, P, device=density.device, dtype=torch.float64)
    total = density.double().cumsum(1)
    above = total[:, :-1] / number
    below = (total[:, -1:] - total[:, :-1]) / (P - number)
    between = number * (P - number) * (above - below) ** 2
    count = between.argmax(1, keepdim=True) + 1
    alike = (density[:, :1] - density[:, -1:]) <= 1e-12
    return torch.where(alike, torch.full_like(count, P), count)


def subsets(mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Group images by the number of patches that a mask selects, so that each group forms a rectangular batch.

    Parameters
    ----------
    mask
        ``(B, P)`` bool.

    Yields
    ------
    rows
        ``(b,)`` int64 images that have the same number L > 0 of selected patches. Images without any are skipped.
    index
        ``(b, L)`` int64 selected patches, sorted.
    """
    counts = mask.sum(1)
    for count in counts.unique().tolist():
        if count > 0:
            rows = (counts == count).nonzero().squeeze(1)
            yield rows, mask[rows].nonzero()[:, 1].reshape(len(rows), count)
