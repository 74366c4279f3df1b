"""What every way of inverting returns.

Letters: B images, L patches kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SyntheticImages:
    """What inversion made.

    Attributes
    ----------
    images
        ``(B, ch, S, S)`` fp32, normalised, within the valid range.
    labels
        ``(B,)`` int64, the class that each image was inverted for.
    kept
        ``(B, L)`` int64, sorted: the patches that were inverted to the end.
    loss
        ``(B,)`` fp32, CE(A(x), y) at the last iteration before its update, as the ensemble saw the image there.
    """

    images: Tensor
    labels: Tensor
    kept: Tensor
    loss: Tensor

    @classmethod
    def join(cls, parts: Sequence[SyntheticImages]) -> SyntheticImages:
        """One after the other; all must have kept as many patches."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))
