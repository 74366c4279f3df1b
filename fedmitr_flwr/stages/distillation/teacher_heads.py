"""Distillation targets from each teacher, in addition to the ensemble's distribution.

The ensemble gives C numbers for an image, and for most random images a nearly uniform distribution. The teachers' [CLS]
tokens hold more information. A branch is a linear map from the student's [CLS] token to one teacher's, and two loss
terms use it: the distance between the mapped token and the teacher's token, and the KL divergence between the outputs
of the teacher's frozen head on both. The maps are trained together with the student and start as the identity, because
clients and student share one initialisation. They are discarded after training; the student remains a plain ViT.

One branch for each member is from Hydra (Tran et al. 2020, arXiv 2001.04694, section 3); the distance of features is
from FitNets (Romero et al. 2015, arXiv 1412.6550, section 2.2). Departures: in Hydra the branches are the final model,
here they only support the student's single head; a branch ends in the teacher's frozen head, not in a new one; and
teachers are weighted by their mean weight over the classes.

Letters: B images, N images of the pool, K teachers, C classes, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from fedmitr_flwr.ensemble.ensemble import Ensemble


class Branches(nn.Module):
    """K linear maps from the student's [CLS] token to the teachers' tokens, followed by the teachers' heads.

    Parameters
    ----------
    weight, bias
        ``(K, C, D)`` and ``(K, C)`` of the teachers' heads, which are not trained.
    share
        ``(K,)`` weight of each teacher; sums to one.
    variance
        ``(K,)`` variance of each teacher's tokens over the images, mean over D: the unit of squared distances. It is at
        least a hundredth of the tokens' mean square; this bound applies if images are nearly equal or there is one.
    """

    weight: Tensor
    bias: Tensor
    share: Tensor
    variance: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, share: Tensor, variance: Tensor) -> None:
        super().__init__()
        K, _, D = weight.shape
        self.maps = nn.Parameter(torch.eye(D, device=weight.device).repeat(K, 1, 1))
        self.shifts = nn.Parameter(torch.zeros(K, D, device=weight.device))
        for name, value in {"weight": weight, "bias": bias, "share": share, "variance": variance}.items():
            self.register_buffer(name, value)

    @classmethod
    def of(cls, ensemble: Ensemble, features: Sequence[Tensor]) -> Branches:
        """Branches to the teachers of an ensemble.

        Parameters
        ----------
        features
            Parts ``(n, K, D)`` of a pool's tokens, on the ensemble's device.
        """
        heads = [head_of(teacher) for teacher in ensemble.teachers]
        share = ensemble.weights.mean(1)
        tokens = (torch.cat([part[:, k] for part in features]).float() for k in range(len(heads)))
        variance = torch.stack([_variance(of_one) for of_one in tokens])
        weight, bias = (torch.stack(parts).to(variance.device) for parts in zip(*heads, strict=True))
        return cls(weight, bias, (share / share.sum()).to(variance.device), variance)

    def forward(self, student: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both loss terms: scalars, mean over the images and weighted mean over the teachers.

        Parameters
        ----------
        student
            ``(B, D)`` [CLS] token of the student, as its head receives it; gradients flow to it.
        features
            ``(B, K, D)`` [CLS] tokens of the teachers.

        Returns
        -------
        feature
            Squared distance between the mapped token and the teacher's, mean over D, divided by `variance`.
        teacher
            ``KL(p_k || q_k)`` in nats. p_k is the output of teacher k's head on its own token, q_k that on the mapped
            token.
        """
        wanted = features.float()
        mapped = torch.einsum("bd,kde->bke", student.float(), self.maps) + self.shifts
        distance = (mapped - wanted).square().mean(-1) / self.variance
        ought, said = (torch.einsum("bkd,kcd->bkc", x, self.weight) + self.bias for x in (wanted, mapped))
        kl = F.kl_div(said.log_softmax(-1), ought.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return (distance @ self.share).mean(), (kl @ self.share).mean()


def head_of(teacher: VisionTransformer) -> tuple[Tensor, Tensor]:
    """Return the fp32 weight ``(C, D)`` and bias ``(C,)`` of a model's head; of two heads, that on the [CLS] token."""
    head = cast(nn.Linear, teacher.head)
    bias = torch.zeros(head.out_features) if head.bias is None else head.bias
    return head.weight.detach().float(), bias.detach().float()


def last_norms(model: VisionTransformer) -> nn.Sequential:
    """Return the layers between the last block's [CLS] token (`vit.TokenOutput.features`) and the head."""
    return nn.Sequential(model.norm, model.fc_norm)


def _variance(tokens: Tensor) -> Tensor:
    """Return the variance of ``(N, D)`` tokens over N, mean over D; at least a hundredth of the mean square."""
    variance = tokens.var(0, correction=min(1, len(tokens) - 1)).mean()
    return variance.maximum(0.01 * tokens.square().mean()).clamp_min(1e-6)
