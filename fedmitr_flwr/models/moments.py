"""Feature moments: the statistics of a client's images from which a classifier head follows in closed form.

A feature is what the classifier head reads, computed with the common initialisation. The moments of several clients
add up to the moments of all their images (`ensemble.moments`). What they reveal about the images is described in
``docs/method.md``.

Dimension letters: B images, C classes, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.data import ImageSet, ImageSpec
from fedmitr_flwr.models.vit import forward_images, head_input
from fedmitr_flwr.settings import SettingsError


@dataclass(frozen=True)
class Moments:
    """Counts, sums and second moments of one client's features.

    Attributes
    ----------
    counts
        ``(C,)`` int64 number of images of each class.
    sums
        ``(C, D)`` fp32 sum of the features of each class; zeros for a class without images.
    products
        ``(D (D + 1) / 2,)`` fp32 upper triangle of the sum of ``x x^T`` over all features x, row by row. The matrix is
        symmetric, so its triangle holds all of it in half of the bytes.
    """

    counts: Tensor
    sums: Tensor
    products: Tensor

    @classmethod
    def blank(cls, num_classes: int, width: int) -> Self:
        """Return moments of C classes and D features that have shapes and dtypes but no memory."""
        with torch.device("meta"):
            return cls(
                torch.empty(num_classes, dtype=torch.int64),
                torch.empty(num_classes, width),
                torch.empty(width * (width + 1) // 2),
            )

    @classmethod
    def of_features(cls, features: Tensor, labels: Tensor, num_classes: int) -> Self:
        """Compute the moments of ``(B, D)`` features with ``(B,)`` int64 labels, in fp64."""
        return cls(*_rounded(*_added(_zeros(num_classes, features.shape[1]), features, labels)))

    def second(self) -> Tensor:
        """Return the sum of ``x x^T`` over all features, ``(D, D)`` fp64."""
        D = self.sums.shape[1]
        row, column = torch.triu_indices(D, D)
        full = torch.zeros(D, D, dtype=torch.float64)
        full[row, column] = full[column, row] = self.products.double()
        return full

    def within(self) -> Tensor:
        """Return the scatter of the features around the means of their classes, ``(D, D)`` fp64."""
        return scatter_within(self.counts.double(), self.sums.double(), self.second())

    def tensors(self) -> dict[str, Tensor]:
        """Return the three tensors by name, for records and files."""
        return {"counts": self.counts, "sums": self.sums, "products": self.products}

    def size(self) -> int:
        """Return the number of bytes."""
        return sum(value.numel() * value.element_size() for value in self.tensors().values())


def class_means(counts: Tensor, sums: Tensor) -> Tensor:
    """Return the mean feature of each class, ``(C, D)``, given counts ``(C,)`` and sums; zeros without images."""
    return sums / torch.where(counts > 0, counts, torch.ones_like(counts))[:, None]


def scatter_within(counts: Tensor, sums: Tensor, second: Tensor) -> Tensor:
    """Return ``M - sum_c s_c s_c^T / n_c``, ``(D, D)``, given n ``(C,)``, s ``(C, D)`` and M ``(D, D)``, all fp64."""
    return second - sums.T @ class_means(counts, sums)


def feature_moments(
    model: VisionTransformer, images: ImageSet, spec: ImageSpec, *, batch_size: int, device: torch.device
) -> Moments:
    """Compute the moments of a client's images under a model, without augmentation.

    The features are fp32 and the sums over them fp64, so the order of the images and their division into batches change
    the moments by rounding alone. Global random state is not used.

    Parameters
    ----------
    model
        The common initialisation. It is moved to `device` and stays in evaluation mode.
    images
        The client's training images.
    spec
        Classes and normalisation.
    batch_size
        Number of images in one forward pass.
    device
        Device of the forward passes. The sums are computed on the CPU, because not every device has fp64.

    Raises
    ------
    SettingsError
        If the model has two heads; see `check_one_head`.
    ValueError
        If a feature is not finite.
    """
    check_one_head(model)
    model.to(device).eval()
    labels = torch.from_numpy(images.labels)
    total = _zeros(spec.num_classes, model.num_features)
    with torch.no_grad():
        for rows in torch.arange(len(images)).split(batch_size):
            x = spec.normalise(images.images(rows)).to(device)
            features = head_input(model, forward_images(model, x).features).float().cpu()
            total = _added(total, features, labels[rows])
    if not bool(torch.isfinite(total[2]).all()):
        raise ValueError("a feature of the common initialisation is not finite; check model.init")
    return Moments(*_rounded(*total))


def check_one_head(model: VisionTransformer, name: str = "") -> None:
    """Raise an error for a model with two classifier heads, such as a distilled DeiT.

    Its heads read different tokens, so there is no single feature from which one head could follow.

    Parameters
    ----------
    model
        The model.
    name
        Value of `model.name` for the message. Empty: the name in the model's configuration.

    Raises
    ------
    SettingsError
        It names ``model.name``.
    """
    if isinstance(model, VisionTransformerDistilled):
        shown = name or (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
        allowed = "has two classifier heads; train.share-moments and train.head-start = discriminant need one head"
        raise SettingsError(("model.name", shown, allowed))


def _zeros(num_classes: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(num_classes, dtype=torch.int64),
        torch.zeros(num_classes, width, dtype=torch.float64),
        torch.zeros(width, width, dtype=torch.float64),
    )


def _added(total: tuple[Tensor, Tensor, Tensor], features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts, sums and the full matrix of second moments with those of more features added."""
    counts, sums, second = total
    x = features.double()
    return (
        counts + torch.bincount(labels, minlength=len(counts)),
        sums.index_add(0, labels, x),
        second + x.T @ x,
    )


def _rounded(counts: Tensor, sums: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row, column = torch.triu_indices(*second.shape)
    return counts, sums.float(), second[row, column].float()
