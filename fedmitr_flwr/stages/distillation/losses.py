"""Compute the loss terms of distillation.

Letters: B images, K teachers, C classes, P patches of the full grid.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.models.vit import forward_patches, forward_tokens, read_tokens
from fedmitr_flwr.settings import DistillSettings
from fedmitr_flwr.stages.density import subsets
from fedmitr_flwr.stages.distillation.frozen import PartTokens
from fedmitr_flwr.stages.distillation.pool import PoolBatch
from fedmitr_flwr.stages.distillation.teacher_heads import Branches, last_norms
from fedmitr_flwr.stages.relabel import soften


@dataclass(frozen=True)
class LossTerms:
    """Unweighted terms of the loss: scalar means over all images of a step.

    An image that lacks a term contributes 0 to it: mixed and random images have no `ce` and no `low`. The sum is
    divided by the number of all images, so the weight of an image does not depend on the others in the step.

    Attributes
    ----------
    kl
        KL(A(x) || s(x)) on full images, in nats.
    ce
        Cross-entropy of the student with the pseudo-label y, in nats.
    low
        KL(q_low || s(x_low)) on the low-density patches, in nats.
    feature
        Squared distance from the teachers' [CLS] tokens in units of their variance (`teacher_heads.Branches`).
    teacher
        KL from the outputs of the teachers' heads on their own tokens to those on the student's mapped token, in nats.
    """

    kl: Tensor
    ce: Tensor
    low: Tensor
    feature: Tensor
    teacher: Tensor

    def total(self, settings: DistillSettings) -> Tensor:
        """Return the weighted sum of all terms."""
        ours = settings.kl_weight * self.kl + settings.ce_weight * self.ce + settings.low_weight * self.low
        return ours + settings.feature_weight * self.feature + settings.teacher_weight * self.teacher

    def detach(self) -> LossTerms:
        """Return the terms detached from the graph."""
        return LossTerms(*(getattr(self, field.name).detach() for field in fields(self)))

    def values(self) -> dict[str, float]:
        """Return the terms as numbers by name; a GPU is waited for."""
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


def loss_terms(
    student: VisionTransformer, batch: PoolBatch, settings: DistillSettings, branches: Branches | None = None
) -> LossTerms:
    """Compute the terms of one step; a term that no weight needs, or without images in this step, is 0.

    Parameters
    ----------
    batch
        The b images of the step.
    branches
        Maps to the teachers' tokens, or None: no `feature` and `teacher` terms.
    """
    images, count, targets = batch.images, len(batch.images), batch.images.targets
    kl = ce = low = feature = teacher = torch.zeros((), device=images.labels.device)
    full_ce = settings.ce_weight > 0 and settings.ce_on == "full"
    if settings.kl_weight > 0 or full_ce or branches is not None:
        if targets.tokens is None:
            seen = forward_patches(student, images.patches, None)
        else:
            seen = forward_tokens(student, targets.tokens.float(), targets.blocks)
        kl = kl_divergence(targets.probabilities, seen.logits, settings.temperature)
        if full_ce:
            ce = F.cross_entropy(seen.logits, images.labels, ignore_index=-1, reduction="sum") / count
        if branches is not None and targets.features is not None:
            feature, teacher = branches(last_norms(student)(seen.features), targets.features)
    if settings.ce_weight > 0 and settings.ce_on == "high" and len(batch.inverted):
        high, chosen = batch.high_tokens, images.patches[batch.inverted]
        out = subset_logits(student, chosen, batch.split.high, high, targets.blocks)
        ce = F.cross_entropy(out, images.labels[batch.inverted], reduction="sum") / count
    present = batch.low_targets.present.nonzero().squeeze(1)
    if settings.low_weight > 0 and len(present):
        low_tokens = None if batch.low_tokens is None else batch.low_tokens[present]
        chosen = images.patches[batch.inverted[present]]
        out = subset_logits(student, chosen, batch.split.low[present], low_tokens, targets.blocks)
        low = kl_divergence(batch.low_targets.probabilities[present], out, 1.0) * (len(present) / count)
    return LossTerms(kl, ce, low, feature, teacher)


def kl_divergence(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(target^(1/T) || softmax(logits / T))``, mean over the images (Hinton et al. 2015).

    Parameters
    ----------
    target, logits
        ``(B, C)`` each.
    temperature
        T; 1 leaves both unchanged.
    """
    if temperature != 1.0:
        target = soften(target, temperature)
    log_student = (logits.float() / temperature).log_softmax(-1)
    return F.kl_div(log_student, target, reduction="batchmean") * temperature**2


def subset_logits(
    student: VisionTransformer, patches: Tensor, mask: Tensor, tokens: PartTokens | None = None, blocks: int = 0
) -> Tensor:
    """Return ``(B, C)`` logits from [CLS] and the masked patches alone; a row without masked patches is zero.

    Parameters
    ----------
    patches, mask
        ``(B, P, E)`` and ``(B, P)`` bool.
    tokens, blocks
        Output of the student's frozen blocks for these patches, and their number; None: all blocks run.
    """
    parts, places = [], []
    for rows, index in subsets(mask):
        if tokens is None:
            chosen = patches[rows].gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))
            parts.append(forward_patches(student, chosen, index).logits)
        else:
            whole = blocks == len(student.blocks)
            count = read_tokens(student) if whole else index.shape[1] + student.num_prefix_tokens
            parts.append(forward_tokens(student, tokens.of(rows, count), blocks).logits)
        places.append(rows)
    logits = torch.cat(parts)
    return logits.new_zeros(len(patches), logits.shape[1]).index_copy(0, torch.cat(places), logits)
