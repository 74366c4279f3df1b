"""What an ensemble of teachers returns: of itself, of each teacher, and the gradient of its loss.

Letters: B images, K teachers, C classes, L patches kept, E pixels of a patch, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class EnsembleOutput:
    """What the ensemble says of a batch.

    Attributes
    ----------
    probabilities
        ``(B, C)``; rows sum to one.
    attention
        ``(B, L)`` [CLS] attention of the last block, mean over heads and weighted mean over the teachers,
        detached; None unless asked for.
    """

    probabilities: Tensor
    attention: Tensor | None


class TeacherOutputs(NamedTuple):
    """What each teacher makes of a batch.

    Attributes
    ----------
    logits
        ``(K, B, C)`` fp32.
    attention
        ``(K, B, L)`` [CLS] attention of the last block, mean over heads.
    features
        ``(K, B, D)`` fp32 [CLS] token as it leaves the last block, before the last norm; None unless asked for.
    """

    logits: Tensor
    attention: Tensor
    features: Tensor | None


@dataclass(frozen=True)
class LossGradient:
    """The loss of a batch and its gradient.

    Attributes
    ----------
    loss
        ``(B,)`` fp32, ``-log A_y(x)``.
    gradient
        ``(B, L, E)`` fp32, of each image's loss for its pixels.
    attention
        ``(B, L)`` as in `EnsembleOutput`.
    probabilities
        ``(B, C)``.
    """

    loss: Tensor
    gradient: Tensor
    attention: Tensor
    probabilities: Tensor
