"""Which patches of an image go on being inverted, and how many are left at the end.

Letters: B images, L patches kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

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


def patches_left(patches: int, settings: InversionSettings) -> int:
    """How many of the full grid's patches an image has; never fewer than one, but by rebirth if there are too few."""
    if settings.method == "rebirth":
        return patches // (len(settings.stops) + 1)
    for fraction in settings.fractions:
        patches = _stay(patches, fraction)
    return patches


def _stay(L: int, fraction: float) -> int:
    return max(1, math.floor(L * (1 - fraction) + 1e-9))
