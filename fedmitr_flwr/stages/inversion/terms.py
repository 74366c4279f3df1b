"""Terms of inversion's loss: contrastive diversity, and disagreement with the student (for `hard_images.HardImages`).

Diversity pushes the images of a batch apart in what the teachers see in them.

After CMI (Contrastive Model Inversion, Fang et al. 2021, arXiv 2105.08584), which asks that each image can be told from
all others by the teacher's features. For image i and teacher k

    l_ik = log sum_j exp(s_ijk / t) - 1 / t,   j over the batch, s_iik = 1

with the cosine s of the two images' [CLS] tokens, and the loss gets ``a sum_i sum_k w_k(y_i) l_ik``. l is near 0 when
all others are far, and log B when all look the same. CMI's authors have a = 0.8 and t = 0.1.

Departures:

- An image's positive partner is itself, where CMI takes a second, cropped view: a second view would double the price of
  an iteration. What is lost is the pull between views, not the push between images.
- No projection head is trained on top of the features; they are the [CLS] token as it leaves the last block, less its
  mean, as the last norm makes it.
- Each of K teachers compares the images in its own features, and has as much to say of an image as of its class.
- No bank of earlier images: each batch has its own seed and checkpoint, and could be inverted elsewhere or anew; a bank
  would make it depend on all batches before it. A larger `inversion.batch-size` does part of what a bank does.
- The gradient flows to both images of a pair; CMI stops it at one.

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
    """The term, weighted.

    Parameters
    ----------
    weight
        a; 0 makes it a waste of time.
    temperature
        t, above 0. At a low one an image is pushed from those most like it, at a high one from all alike.
    """

    def __init__(self, weight: float, temperature: float) -> None:
        self._weight, self._temperature = weight, temperature

    def __call__(self, seen: Seen) -> Tensor:
        """See `loss_terms.Term`."""
        parts = zip(seen.features, seen.shares, strict=True)
        each = [(share * contrast(features, self._temperature)).sum() for features, share in parts]
        return self._weight * torch.stack(each).sum()


def terms_of(settings: InversionSettings) -> tuple[Term, ...]:
    """Return the terms that the settings ask for."""
    return (Diversity(settings.diversity, settings.diversity_temperature),) if settings.diversity > 0 else ()


def contrast(features: Tensor, temperature: float) -> Tensor:
    """Each image's l for each teacher, ``(T, B)``, of ``(T, B, D)`` features."""
    similarity = similarities(features)
    own = torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    return (similarity.masked_fill(own, 1.0) / temperature).logsumexp(-1) - 1 / temperature


def similarities(features: Tensor) -> Tensor:
    """Cosines of all pairs of images, ``(T, B, B)``, of ``(T, B, D)`` features less their mean over D."""
    unit = F.normalize(features - features.mean(-1, keepdim=True), dim=-1)
    return unit @ unit.mT


class Disagreement:
    """The competition term, weighted.

    Parameters
    ----------
    student
        In eval mode; it sees what the ensemble sees, and its weights get no gradient.
    weight
        a; 0 makes it a waste of time.
    """

    def __init__(self, student: VisionTransformer, weight: float) -> None:
        self._student, self._weight = student, weight

    def __call__(self, seen: Seen) -> Tensor:
        """See `loss_terms.Term`."""
        logits = forward_patches(self._student, seen.patches, seen.index).logits
        return -self._weight * jensen_shannon(seen.probabilities, logits.float().softmax(-1)).sum()


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Divergence of each image's two distributions in nats, ``(B,)``, of ``(B, C)`` probabilities; at most log 2."""
    p, q = p.clamp_min(1e-12), q.clamp_min(1e-12)
    mean = ((p + q) / 2).log()
    return ((p * (p.log() - mean)).sum(-1) + (q * (q.log() - mean)).sum(-1)) / 2
