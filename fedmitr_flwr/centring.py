"""Centring: an image is inverted from its middle outwards (Plug-In Inversion, Ghiasi et al. 2022, arXiv 2201.12961).

The paper optimises a small image first and then pads it with noise, again and again until it has its full size; its
zoom enlarges a coarse image instead. On a ViT's fixed grid the natural reading of both is a growing set of patches:
at first those in the middle, then one ring of patches more at a time, in equal spans, until the whole grid is there.
The optimiser starts anew whenever the image grows, as it must where a larger image takes the place of a smaller one.
Ours is that patches before their time are no tokens: the ensemble does not see their noise, and an iteration costs no
more than the patches that are there. Stops come after centring, on the whole grid.

Letters: B images, P patches of the full grid, L patches kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmitr_flwr.grid import PatchGrid


def growth(grid: PatchGrid, iterations: int) -> dict[int, Tensor]:
    """Patches that are inverted from an iteration on.

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
