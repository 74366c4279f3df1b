"""Schedule of inversion: which patches are added (growth from the centre) and stopped at which iteration.

Letters: B images, P patches of the full grid, L patches kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import InversionSettings

Choice = Callable[[Tensor], Tensor]
"""Function from the ``(B, L)`` attention to the sorted places ``(B, L')`` of the patches that stay in the sequence."""


def most_attended(attention: Tensor, fraction: float) -> Tensor:
    """Return the places of the patches that stay when the least attended `fraction` of them is stopped.

    Parameters
    ----------
    attention
        ``(B, L)``.
    fraction
        At least 0 and below 1; 0 stops none. ``floor(L (1 - fraction))`` patches stay, at least one. Four stops of 0.3
        leave 46 of 196 patches, as in SMI.

    Returns
    -------
    Tensor
        ``(B, L')`` int64 places into L, sorted; at equal attention the earlier place stays.

    Raises
    ------
    ValueError
        If `fraction` is below 0 or at least 1.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"the fraction of patches to stop must be at least 0 and below 1, not {fraction:g}")
    stay = _stay(attention.shape[1], fraction)
    order = attention.sort(dim=1, descending=True, stable=True).indices
    return order[:, :stay].sort(dim=1).values


def kept_after_stops(patches: int, settings: InversionSettings) -> list[int]:
    """Return how many of P patches stay after each stop of sparse inversion; at least one."""
    kept = []
    for fraction in settings.fractions:
        patches = _stay(patches, fraction)
        kept.append(patches)
    return kept


def _stay(L: int, fraction: float) -> int:
    return max(1, math.floor(L * (1 - fraction) + 1e-9))


def growth(grid: PatchGrid, iterations: int) -> dict[int, Tensor]:
    """Return which patches are inverted from which iteration on: first the centre of the image, then ring after ring.

    This follows Plug-In Inversion (Ghiasi et al. 2022, arXiv 2201.12961), which optimises a small image and pads it
    with noise repeatedly until it has its full size. On the fixed grid of a ViT we add one ring of patches at a time,
    after equal numbers of iterations. The optimiser restarts at each growth, as in the paper. Departure: patches not
    yet added are excluded from the sequence, so the ensemble does not see their noise, and an iteration costs no more
    than the patches already added. Stops come after the growth.

    Parameters
    ----------
    grid
        Rows and columns of patches.
    iterations
        Iteration, counted from 0, at which the last ring is added; 0: the whole grid from the start.

    Returns
    -------
    dict[int, Tensor]
        Iteration to the ``(L,)`` int64 patches that are inverted from it on, sorted. If several rings fall on one
        iteration, they are added together. Empty when `iterations` is 0.
    """
    if iterations == 0:
        return {}
    rings = _rings(grid)
    last = int(rings.max())
    return {iterations * number // max(1, last): (rings <= number).nonzero().squeeze(1) for number in range(last + 1)}


def _rings(grid: PatchGrid) -> Tensor:
    """Return each patch's ring, ``(P,)`` int64 with 0 at the centre; rings have the proportions of the grid."""
    rows, columns = grid.shape
    down = (2 * torch.arange(rows) - (rows - 1)).abs() * columns
    right = (2 * torch.arange(columns) - (columns - 1)).abs() * rows
    distance = torch.maximum(down[:, None], right[None, :]).flatten()
    number: Tensor = distance.unique(return_inverse=True)[1]
    return number
