"""Further terms of the inversion's loss: contrastive diversity, and disagreement with the student.

`Diversity` pushes the teachers' features of the images in a batch apart. It follows CMI (Contrastive Model Inversion,
Fang et al. 2021, arXiv 2105.08584), which makes each image distinguishable from all others by the teacher's features.
For image i and teacher k

    l_ik = log sum_j exp(s_ijk / t) - 1 / t,   j over the batch, s_iik = 1

where s is the cosine between the [CLS] tokens of images i and j; the term is ``a sum_i sum_k w_k(y_i) l_ik``. l is
near 0 when all other images are far away, and log B when all images have the same features. CMI uses a = 0.8 and
t = 0.1.

Departures from CMI:

- The positive partner of an image is the image itself; CMI uses a second, cropped view, which would double the cost of
  an iteration. The attraction between views is lost; the repulsion between images is kept.
- No projection head is trained on the features. They are the [CLS] token after the last block minus its mean over D, as
  in the last norm.
- Each of the K teachers compares the images in its own features, weighted by its weight for the image's class.
- There is no bank of earlier images. A bank would make a batch depend on all batches before it, but each batch has its
  own seed and checkpoint and can be inverted alone. A larger `inversion.batch-size` has part of the effect of a bank.
- The gradient flows to both images of a pair; CMI stops it at one of them.

`Disagreement` is used by `hard_images.HardImages` to find images on which student and ensemble differ.

Letters: B images, T teachers of one step, D embedding.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.ensemble.loss_terms import Seen, Term
from fedmitr_flwr.models.vit import forward_patches
from fedmitr_flwr.settings import InversionSettings


class Diversity:
    """Contrastive diversity of a batch, weighted.

    Parameters
    ----------
    weight
        a; 0 disables the effect but not the cost.
    temperature
        t, above 0. At a low temperature an image is pushed away from the most similar images; at a high one, equally
        from all.
    """

    def __init__(self, weight: float, temperature: float) -> None:
        self._weight, self._temperature = weight, temperature

    def __call__(self, seen: Seen) -> Tensor:
        """See `loss_terms.Term`."""
        parts = zip(seen.features, seen.shares, strict=True)
        each = [(share * contrast(features, self._temperature)).sum() for features, share in parts]
        return self._weight * torch.stack(each).sum()


def terms_of(settings: InversionSettings) -> tuple[Term, ...]:
    """Return the terms that the settings turn on; `Disagreement` is not among them, since it needs the student."""
    return (Diversity(settings.diversity, settings.diversity_temperature),) if settings.diversity > 0 else ()


def contrast(features: Tensor, temperature: float) -> Tensor:
    """Return l for each teacher and image, ``(T, B)``, from ``(T, B, D)`` features."""
    similarity = similarities(features)
    own = torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    return (similarity.masked_fill(own, 1.0) / temperature).logsumexp(-1) - 1 / temperature


def similarities(features: Tensor) -> Tensor:
    """Return the cosines of all pairs of images, ``(T, B, B)``, from ``(T, B, D)`` features minus their mean over D."""
    unit = F.normalize(features - features.mean(-1, keepdim=True), dim=-1)
    return unit @ unit.mT


class Disagreement:
    """Negative Jensen-Shannon divergence between ensemble and student, weighted: Adaptive DeepInversion's competition.

    Parameters
    ----------
    student
        A model in eval mode; it receives the same patches as the ensemble, and its weights get no gradient.
    weight
        a; 0 disables the effect but not the cost.
    """

    def __init__(self, student: VisionTransformer, weight: float) -> None:
        self._student, self._weight = student, weight

    def __call__(self, seen: Seen) -> Tensor:
        """See `loss_terms.Term`."""
        logits = forward_patches(self._student, seen.patches, seen.index).logits
        return -self._weight * jensen_shannon(seen.probabilities, logits.float().softmax(-1)).sum()


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Return the ``(B,)`` Jensen-Shannon divergences of ``(B, C)`` distributions, in nats; at most log 2."""
    p, q = p.clamp_min(1e-12), q.clamp_min(1e-12)
    mean = ((p + q) / 2).log()
    return ((p * (p.log() - mean)).sum(-1) + (q * (q.log() - mean)).sum(-1)) / 2
