"""What each teacher makes of an image, as something for the student to learn beside what they say together.

The ensemble's distribution is C numbers of an image, and most random images get a flat one. Its teachers know more: so
the student's [CLS] token is mapped to each teacher's by a linear map of its own (a branch), and is to come near it, and
near what the teacher's own head reads in it. The maps are learnt with the student, from the identity, as clients and
student come from one initialisation; they are thrown away in the end, and the student is a plain ViT.

A branch for each member is from Hydra (Tran et al. 2020, arXiv 2001.04694, section 3), the distance of features from
FitNets (Romero et al. 2015, arXiv 1412.6550, section 2.2). Departures: Hydra's branches are the result, ours a help for
the one head beside them; a branch ends in the teacher's frozen head in place of a new one; and teachers count by their
mean weight over the classes.

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
    """K linear maps from the student's [CLS] token to the teachers', and the teachers' heads.

    Parameters
    ----------
    weight, bias
        ``(K, C, D)`` and ``(K, C)`` of the teachers' heads, which are not learnt.
    share
        ``(K,)`` how much each teacher counts; sums to one.
    variance
        ``(K,)`` of the teachers' tokens over images, mean over D: the unit of squared distances. At least a hundredth
        of the tokens' mean square, which is what counts where images are alike or there is only one.
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
        """Distance of the mapped token from each teacher's, and of what the teacher's head reads in both.

        Parameters
        ----------
        student
            ``(B, D)`` the student's [CLS] token as its head sees it; gradients flow to it.
        features
            ``(B, K, D)`` the teachers'.

        Returns
        -------
        feature
            Squared distance in units of the teacher's variance, scalar: mean over images, weighted over teachers.
        teacher
            ``KL(p_k || q_k)`` in nats, likewise.
        """
        wanted = features.float()
        mapped = torch.einsum("bd,kde->bke", student.float(), self.maps) + self.shifts
        distance = (mapped - wanted).square().mean(-1) / self.variance
        ought, said = (torch.einsum("bkd,kcd->bkc", x, self.weight) + self.bias for x in (wanted, mapped))
        kl = F.kl_div(said.log_softmax(-1), ought.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return (distance @ self.share).mean(), (kl @ self.share).mean()


def head_of(teacher: VisionTransformer) -> tuple[Tensor, Tensor]:
    """Weight ``(C, D)`` and bias ``(C,)`` of a model's head, fp32; of two heads, the one on the [CLS] token."""
    head = cast(nn.Linear, teacher.head)
    bias = torch.zeros(head.out_features) if head.bias is None else head.bias
    return head.weight.detach().float(), bias.detach().float()


def last_norms(model: VisionTransformer) -> nn.Sequential:
    """What lies between the [CLS] token as it leaves the last block (`vit.TokenOutput.features`) and the head."""
    return nn.Sequential(model.norm, model.fc_norm)


def _variance(tokens: Tensor) -> Tensor:
    """Variance over N, mean over D, of ``(N, D)``; not less than a hundredth of the mean square."""
    variance = tokens.var(0, correction=min(1, len(tokens) - 1)).mean()
    return variance.maximum(0.01 * tokens.square().mean()).clamp_min(1e-6)
