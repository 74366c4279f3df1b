"""Classifier heads in closed form from the clients' feature moments.

The moments of the clients add up to those of the pooled images, whatever the partition. A head that depends on the
images through their moments alone is therefore the head of centralised training on the pooled features, up to rounding.
Everything is computed in fp64. Sources: FedCGS (arXiv 2503.06962) and GH-OFL (arXiv 2602.01186) for the linear
discriminant, AFL (CVPR 2025, arXiv 2405.16240) for least squares.

Letters: K clients, C classes, C' classes with images, D embedding; n images, n_c of class c, s_c the sum of their
features, m_c = s_c / n_c, m the mean of all features, M the sum of x x^T over all features x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmitr_flwr.models.moments import Moments, class_means, scatter_within

ABSENT = -100.0
"""Bias of a class without images, relative to the mean logit of the other classes. Its probability is below 1e-43."""

# A scatter matrix whose trace is below this part of the second moments' is the rounding of fp32 moments.
_ROUNDING = 2.0**-20


@dataclass(frozen=True)
class PooledMoments:
    """Moments of the images of all clients together, fp64.

    Attributes
    ----------
    counts
        ``(C,)`` number of images n_c. Not an integer if some client counts less than it claims.
    sums
        ``(C, D)`` s_c.
    second
        ``(D, D)`` M.
    """

    counts: Tensor
    sums: Tensor
    second: Tensor

    @property
    def present(self) -> Tensor:
        """``(C,)`` bool: the classes with images."""
        return self.counts > 0

    def means(self) -> Tensor:
        """Return the mean feature m_c of each class, ``(C, D)``; zeros for a class without images."""
        return class_means(self.counts, self.sums)

    def within(self) -> Tensor:
        """Return the scatter of the features around the means of their classes, ``M - sum_c s_c s_c^T / n_c``."""
        return scatter_within(self.counts, self.sums, self.second)


@dataclass(frozen=True)
class Head:
    """A classifier head.

    The rows of the classes with images are shifted by a common row so that their mean is zero. This changes neither the
    most probable class nor any probability. The largest logit of these classes is then at least 0 for every input, and
    a class without images (weight 0, bias `ABSENT`) never wins.

    Attributes
    ----------
    weight, bias
        ``(C, D)`` and ``(C,)`` fp64.
    """

    weight: Tensor
    bias: Tensor


def pool(moments: Sequence[Moments], scales: Tensor | None = None) -> PooledMoments:
    """Add the moments of K clients.

    Parameters
    ----------
    moments
        K >= 1 moments with the same C and D.
    scales
        ``(K,)`` factors in 0..1 by which a client's images count; None: 1 for all.
    """
    factors = [1.0] * len(moments) if scales is None else scales.tolist()
    C, D = moments[0].sums.shape
    counts = torch.zeros(C, dtype=torch.float64)
    sums = torch.zeros(C, D, dtype=torch.float64)
    second = torch.zeros(D, D, dtype=torch.float64)
    for client, factor in zip(moments, factors, strict=True):
        counts += factor * client.counts.double()
        sums += factor * client.sums.double()
        second += factor * client.second()
    return PooledMoments(counts, sums, second)


def discriminant_head(pooled: PooledMoments, shrinkage: float, *, equal_priors: bool, scale: float = 1.0) -> Head:
    """Compute the linear discriminant with a shared covariance that is shrunk to its scaled identity.

    With ``W = M - sum_c s_c s_c^T / n_c``, the scatter within the classes::

        S   = W / (n - C')
        S_g = (1 - g) S + g tr(S) / D I
        w_c = S_g^-1 m_c,    b_c = log p_c - m_c^T S_g^-1 m_c / 2

    GH-OFL's linear discriminant has this covariance and shrinkage. The published code of FedCGS inverts the covariance
    of all features, without shrinkage. With few images that matrix is singular, and the shrinkage here makes it
    invertible for any number of images.

    Parameters
    ----------
    pooled
        Moments of at least one image.
    shrinkage
        g, above 0 and at most 1. 1: only the distances to the class means count (nearest class mean).
    equal_priors
        Whether p_c is the same for all classes with images; otherwise it is n_c / n.
    scale
        Factor on the logits of the classes with images. Below 1 it makes the distribution flatter.

    Returns
    -------
    Head
        If the features within the classes do not differ, as with one image a class, S is a multiple of the identity.
    """
    present, means, D = pooled.present, pooled.means(), pooled.sums.shape[1]
    free = max(float(pooled.counts.sum()) - int(present.sum()), 1.0)
    within, spread = pooled.within() / free, pooled.second.trace()
    if float(within.trace()) * free <= _ROUNDING * float(spread):
        within = torch.eye(D, dtype=torch.float64) * spread / pooled.counts.sum() / D
    target = shrinkage * float(within.trace()) / D
    centre = means[present].mean(0)  # the same for all classes, so it only keeps the numbers small
    precise = (means - centre) @ _inverse(within, 1.0 - shrinkage, target)
    bias = -0.5 * (precise * (means + centre)).sum(1)
    if not equal_priors:
        bias = bias + (pooled.counts / pooled.counts.sum()).clamp_min(1e-300).log()
    return _centred(scale * precise, scale * bias, present)


def ridge_head(pooled: PooledMoments, strength: float) -> Head:
    """Compute regularised least squares on one-hot targets, with an intercept that is not regularised.

    With ``G = M - n m m^T``, the scatter around the mean::

        w_c = (G + r tr(G) / D I)^-1 (s_c - n_c m),    b_c = n_c / n - w_c m

    AFL has no intercept and an absolute regularisation; its aggregation law gives the same pooled solution. Here the
    regularisation is relative to the mean eigenvalue of G, so one value fits any model and any number of images.

    Parameters
    ----------
    pooled
        Moments of at least one image.
    strength
        r, above 0.

    Returns
    -------
    Head
        Its outputs estimate the probability of each class directly. As logits of a softmax they give a nearly even
        distribution, although the most probable class is right.
    """
    number, D = pooled.counts.sum(), pooled.sums.shape[1]
    mean = pooled.sums.sum(0) / number
    scatter = pooled.second - number * torch.outer(mean, mean)
    target = strength * max(float(scatter.trace()), _ROUNDING * float(pooled.second.trace())) / D
    weight = (pooled.sums - pooled.counts[:, None] * mean) @ _inverse(scatter, 1.0, target)
    return _centred(weight, pooled.counts / number - weight @ mean, pooled.present)


def _inverse(matrix: Tensor, factor: float, added: float) -> Tensor:
    """Return the inverse of ``factor * matrix + added * I`` for a symmetric matrix whose eigenvalues are at least 0.

    Eigenvalues that rounding made negative count as 0.
    """
    values, vectors = torch.linalg.eigh(matrix)
    inverse: Tensor = (vectors / (factor * values.clamp_min(0.0) + added)) @ vectors.T
    return inverse


def _centred(weight: Tensor, bias: Tensor, present: Tensor) -> Head:
    """Subtract the mean row of the classes with images, and give the other classes rows that never win."""
    weight = torch.where(present[:, None], weight - weight[present].mean(0), torch.zeros_like(weight))
    bias = torch.where(present, bias - bias[present].mean(), torch.full_like(bias, ABSENT))
    return Head(weight, bias)
