"""Start a client's classifier head from a linear discriminant that is comparable with those of the other clients.

A head that starts from random or zero weights learns a client's classes relative to each other only. Averaged with the
heads of clients that have other classes, it says little about which of all classes an image shows. A discriminant with
a covariance that all clients share scores every class on one scale: the class-wise mean of such heads, weighted by
numbers of images, is the discriminant of all images together, up to its bias. The shared covariance is the
`FeaturePrior`, which needs no images. This start is ours.

Letters: C classes, D embedding, n images of the client, n_c of class c, m_c mean feature of class c.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedmitr_flwr.models.feature_prior import FeaturePrior
from fedmitr_flwr.models.moments import Moments

PRIOR_IMAGES = 4000.0
"""Number of images that the prior covariance counts as, against the client's own."""

MEAN_IMAGES = 10.0
"""Number of images that the client's mean feature counts as in the mean of each class."""

RIDGE = 0.1
"""Fraction of the prior covariance that is replaced by its scaled identity, so that it can be inverted."""

SCALE = 0.1
"""Factor on the discriminant's logits, which are overconfident because D is large and the features are not Gaussian."""


@torch.no_grad()
def start_head(model: VisionTransformer, moments: Moments, prior: FeaturePrior) -> None:
    """Replace the weights of a model's classifier head by the client's discriminant.

    Parameters
    ----------
    model
        The model in which the head is replaced. `model.head` must be linear.
    moments
        Moments of the client's images under the same model.
    prior
        Mean and covariance of the features of the common initialisation.
    """
    weight, bias = discriminant(moments, prior)
    head = model.head
    assert isinstance(head, nn.Linear)
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.copy_(bias)


def discriminant(moments: Moments, prior: FeaturePrior) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a client's discriminant, ``(C, D)`` and ``(C,)`` fp32.

    With the prior mean m_0, the prior covariance S_0 and the covariance S_k of the client's features within its
    classes, scaled to the trace of S_0::

        S   = (a S_0 + n S_k) / (a + n),                a = PRIOR_IMAGES
        u_c = (n_c m_c + b m) / (n_c + b) - m_0,        b = MEAN_IMAGES, m the client's mean feature
        w_c = SCALE S^-1 u_c,    bias_c = -w_c^T (u_c / 2 + m_0)

    A class without images gets the score of the client's mean feature.
    """
    counts, sums, D = moments.counts.double(), moments.sums.double(), moments.sums.shape[1]
    n = counts.sum()
    base = prior.covariance.double()
    base = (1 - RIDGE) * base + RIDGE * base.trace() / D * torch.eye(D, dtype=torch.float64)
    own = moments.within()
    own = own * (base.trace() / own.trace().clamp_min(1e-12))
    free = (n - (counts > 0).sum()).clamp_min(0.0)
    covariance = (PRIOR_IMAGES * base + free * own) / (PRIOR_IMAGES + free)
    centre = prior.mean.double()
    means = (sums + MEAN_IMAGES * sums.sum(0) / n) / (counts + MEAN_IMAGES)[:, None] - centre
    weight = SCALE * torch.linalg.solve(covariance, means.T).T
    bias = -(weight * (means / 2 + centre)).sum(1)
    return weight.float(), bias.float()
