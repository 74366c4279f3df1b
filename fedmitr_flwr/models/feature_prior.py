"""What is known of a model's features before any client is asked: their mean and covariance on random images.

Some directions of a pretrained model's features vary much more than others, whatever the image shows. A head that does
not know them reads mostly these directions. Random images that need no data (`stages.feature_prior`) show which they
are.

Dimension letters: D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeaturePrior:
    """Mean and covariance of the features of the common initialisation on random images.

    Attributes
    ----------
    mean
        ``(D,)`` fp32.
    covariance
        ``(D, D)`` fp32, symmetric, mean over the families of random images of the covariance within a family.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of_features(cls, families: list[Tensor]) -> Self:
        """Compute the prior from ``(N, D)`` features of each family of random images, in fp64."""
        mean = torch.cat(families).double().mean(0)
        centred = torch.cat([features.double() - features.double().mean(0) for features in families])
        return cls(mean.float(), (centred.T @ centred / len(centred)).float())

    def tensors(self) -> dict[str, Tensor]:
        """Return the two tensors by name, for records."""
        return {"mean": self.mean, "covariance": self.covariance}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Return the prior that `tensors` describes, the inverse of `tensors()`."""
        return cls(tensors["mean"], tensors["covariance"])
