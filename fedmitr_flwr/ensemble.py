"""The K client models as one frozen function, A(x) = sum_k w_k(c) p_k(c|x).

Letters: B images, K teachers, C classes, L patches kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.vit import forward_patches


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


class Ensemble:
    """K frozen teachers with class-wise weights.

    A teacher's distribution is taken over the classes in which it has a weight: one that never saw a class (its
    label histogram says so) has logits for it that nothing trained, and they must not take probability from the
    others. Ours; it is without effect under weightings that give every teacher a say in every class.

    The class-wise weighted sum of distributions is not a distribution over classes when the weights
    differ from class to class, so it is divided by its sum over c. With weights that are the same for
    all classes the sum is one and nothing changes.

    Parameters
    ----------
    teachers
        K timm ViTs that `vit.check_supported` accepts; they are put into eval mode and frozen.
    weights
        ``(K, C)`` non-negative, each column sums to one.
    """

    def __init__(self, teachers: Sequence[VisionTransformer], weights: Tensor) -> None:
        if weights.ndim != 2 or len(weights) != len(teachers) or len(teachers) == 0:
            raise ValueError(f"weights of shape {tuple(weights.shape)} do not fit {len(teachers)} teachers")
        self.teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]
        self.weights = weights
        unknown = (weights == 0) & (weights > 0).any(1, keepdim=True)
        self._bias = torch.where(unknown, torch.full_like(weights, -1e9), torch.zeros_like(weights))  # (K, C)

    def __call__(
        self,
        patches: Tensor,
        index: Tensor | None = None,
        *,
        attention: bool = False,
        labels: Tensor | None = None,
    ) -> EnsembleOutput:
        """Evaluate A on patches; gradients flow to `patches`.

        Parameters
        ----------
        patches
            ``(B, L, E)`` flattened normalised patches.
        index
            ``(B, L)`` int64 positions in the full grid; None for the full grid in order.
        attention
            Whether to return the attention as well.
        labels
            ``(B,)`` int64 classes that the images are meant to show. A teacher's share in the attention is its weight
            for that class; without labels, its weights averaged over what the ensemble itself sees.
        """
        outputs = [forward_patches(teacher, patches, index, attention=attention) for teacher in self.teachers]
        probabilities = self.combine(torch.stack([out.logits.float() for out in outputs]))
        if not attention:
            return EnsembleOutput(probabilities, None)
        if labels is None:
            share = probabilities.detach() @ self.weights.T  # (B, K)
            share = share / share.sum(-1, keepdim=True)
        else:
            share = self.weights[:, labels].T
        seen = torch.stack([out.attention.detach() for out in outputs if out.attention is not None])
        return EnsembleOutput(probabilities, torch.einsum("bk,kbl->bl", share, seen))

    def combine(self, logits: Tensor) -> Tensor:
        """Combine the teachers' ``(K, B, C)`` logits into the ensemble's ``(B, C)`` probabilities."""
        probabilities = (logits + self._bias[:, None]).softmax(-1)
        total = (self.weights[:, None] * probabilities).sum(0)
        return total / total.sum(-1, keepdim=True).clamp_min(1e-30)
