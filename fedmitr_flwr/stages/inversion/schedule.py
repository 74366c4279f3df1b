"""Which patches of an image are inverted at which iteration: growth from the centre, and stops.

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
"""Of the ``(B, L)`` attention, the places ``(B, L')``, sorted, of the patches that go on."""


def most_attended(attention: Tensor, fraction: float) -> Tensor:
    """Places of the patches that stay when `fraction` of them with the least attention stops.

    Parameters
    ----------
    attention
        ``(B, L)``.
    fraction
        Between 0 and 1; ``floor(L (1 - fraction))`` patches stay, at least one (SMI: 46 of 196 after four times 0.3).

    Returns
    -------
    Tensor
        ``(B, L')`` int64 places into L, sorted; of equal attention the earlier place stays.

    Raises
    ------
    ValueError
        If `fraction` is below 0, or 1 and above, which no patch would survive.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"{fraction:g} of the patches can't stop: a fraction lies between 0 and 1, 1 excluded")
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
    """Patches that are inverted from an iteration on: first the centre of the image, then ring by ring the rest.

    After Plug-In Inversion (Ghiasi et al. 2022, arXiv 2201.12961), which optimises a small image and pads it with noise
    again and again until it has its full size. On a ViT's fixed grid we add one ring of patches at a time, in equal
    spans. The optimiser starts anew whenever the image grows, as it does in the paper. Departure: patches not yet added
    are excluded from the sequence, so that the ensemble does not see their noise and an iteration costs no more than
    the patches that are there. Stops come after centring, on the whole grid.

    Parameters
    ----------
    grid
        Rows and columns of patches.
    iterations
        Before this one, counted from 0, the whole grid is there; 0: from the start.

    Returns
    -------
    dict[int, Tensor]
        Iteration to ``(L,)`` int64 patches, sorted; rings that come at the same iteration come as one. Empty when the
        whole grid is there from the start.
    """
    if iterations == 0:
        return {}
    rings = _rings(grid)
    last = int(rings.max())
    return {iterations * number // max(1, last): (rings <= number).nonzero().squeeze(1) for number in range(last + 1)}


def _rings(grid: PatchGrid) -> Tensor:
    """``(P,)`` int64: each patch's ring, 0 in the middle; rings of an oblong grid are as oblong as it is."""
    rows, columns = grid.shape
    down = (2 * torch.arange(rows) - (rows - 1)).abs() * columns
    right = (2 * torch.arange(columns) - (columns - 1)).abs() * rows
    distance = torch.maximum(down[:, None], right[None, :]).flatten()
    number: Tensor = distance.unique(return_inverse=True)[1]
    return number
