"""Terms of the inversion's loss beside cross-entropy and prior, and how they join its one backward pass.

A term is a function of what the ensemble says and sees; autograd differentiates it in these few small tensors, and the
teachers' own pass takes the result back to the pixels together with the cross-entropy's.

Letters: B images, K teachers, T teachers of one step, C classes, L patches kept, E pixels of a patch, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What a term may look at.

    Attributes
    ----------
    patches
        ``(B, L, E)`` pixels as the ensemble sees them; gradients flow to them.
    index
        ``(B, L)`` int64 positions in the grid; None: all, in order.
    labels
        ``(B,)`` int64.
    probabilities
        ``(B, C)`` A(x); gradients flow to the teachers through it.
    features
        ``(T, B, D)`` each, of all K teachers in parts: [CLS] as it leaves the last block, before the last norm;
        gradients flow to the teachers through them.
    shares
        ``(T, B)`` each, in the same parts: the teachers' weights for the images' labels.
    """

    patches: Tensor
    index: Tensor | None
    labels: Tensor
    probabilities: Tensor
    features: Sequence[Tensor]
    shares: Sequence[Tensor]


class Term(Protocol):
    """A term of the loss."""

    def __call__(self, seen: Seen) -> Tensor:
        """Return its value, weighted and summed over the images, a scalar."""
