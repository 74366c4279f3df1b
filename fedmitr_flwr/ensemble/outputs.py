"""Outputs of the ensemble, outputs of each teacher, and the ensemble's loss with its gradient.

Letters: B images, K teachers, C classes, L patches kept, E pixels of a patch, N tokens, D embedding, Q rows that the
head reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class EnsembleOutput:
    """Outputs of the ensemble for a batch.

    Attributes
    ----------
    probabilities
        ``(B, C)``; rows sum to one.
    attention
        ``(B, L)`` [CLS] attention of the last block, mean over the heads and weighted mean over the teachers,
        detached; None unless requested.
    """

    probabilities: Tensor
    attention: Tensor | None


class TeacherOutputs(NamedTuple):
    """Outputs of each teacher for a batch.

    Attributes
    ----------
    logits
        ``(K, B, C)`` fp32; ``(K + 1, B, C)`` if the ensemble has an expert, whose logits are the last.
    attention
        ``(K, B, L)`` [CLS] attention of the last block, mean over the heads.
    features
        ``(K, B, D)`` fp32 [CLS] token after the last block, before the last norm; None unless requested.
    tokens
        ``(B, N, D)`` fp32 output of the blocks that all teachers share, or ``(B, Q, D)`` if the last block is one of
        them (`vit.TrunkOutput`); None unless requested, and if no block is shared.
    """

    logits: Tensor
    attention: Tensor
    features: Tensor | None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class LossGradient:
    """The loss of a batch and its gradient.

    Attributes
    ----------
    loss
        ``(B,)`` fp32, ``-log A_y(x)``.
    gradient
        ``(B, L, E)`` fp32, gradient of each image's loss, and of any further terms, with respect to its pixels.
    attention
        ``(B, L)`` as in `EnsembleOutput`.
    probabilities
        ``(B, C)`` A(x).
    """

    loss: Tensor
    gradient: Tensor
    attention: Tensor
    probabilities: Tensor
