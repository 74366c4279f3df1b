"""Interface of the inversion's loss terms other than cross-entropy and prior.

A term is a function of the ensemble's inputs and outputs. Autograd differentiates it with respect to these tensors, and
the teachers' hand-written backward pass carries the result to the pixels together with the gradient of the
cross-entropy.

Letters: B images, K teachers, T teachers of one step, C classes, L patches kept, E pixels of a patch, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """Inputs of a term.

    Attributes
    ----------
    patches
        ``(B, L, E)`` pixels as the ensemble receives them, after jitter and ColorShift; gradients flow to them.
    index
        ``(B, L)`` int64 positions in the grid; None: all patches, in order.
    labels
        ``(B,)`` int64.
    probabilities
        ``(B, C)`` A(x); gradients flow through it to the teachers.
    features
        One ``(T, B, D)`` tensor for each step; together they hold all K teachers. The [CLS] tokens after the last
        block, before the last norm; gradients flow through them to the teachers.
    shares
        One ``(T, B)`` tensor for each step: the teachers' weights for the images' labels.
    """

    patches: Tensor
    index: Tensor | None
    labels: Tensor
    probabilities: Tensor
    features: Sequence[Tensor]
    shares: Sequence[Tensor]


class Term(Protocol):
    """A further term of the inversion's loss."""

    def __call__(self, seen: Seen) -> Tensor:
        """Return the scalar value of the term: weighted, and summed over the images."""
