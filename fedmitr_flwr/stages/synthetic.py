"""The synthetic images that every inversion method returns.

Letters: B images, L patches kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SyntheticImages:
    """A set of inverted images.

    Attributes
    ----------
    images
        ``(B, ch, S, S)`` fp32, normalised pixels within the valid range.
    labels
        ``(B,)`` int64, the target class of each image.
    kept
        ``(B, L)`` int64, sorted; the patches that were inverted to the end.
    loss
        ``(B,)`` fp32, CE(A(x), y) in nats in the last iteration, before its update and under its random views.
    """

    images: Tensor
    labels: Tensor
    kept: Tensor
    loss: Tensor

    @classmethod
    def join(cls, parts: Sequence[SyntheticImages]) -> SyntheticImages:
        """Concatenate sets of images; all must have the same number of kept patches."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))
