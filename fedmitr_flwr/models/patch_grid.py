"""Geometry of images that are cut into patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.vit import patch_size, patchify, unpatchify


@dataclass(frozen=True)
class PatchGrid:
    """Geometry and valid pixel range of the synthetic images.

    Attributes
    ----------
    channels, image_size
        Of the square images.
    patch
        Height and width of a patch in pixels.
    low, high
        ``(ch,)`` valid range of normalised pixels.
    """

    channels: int
    image_size: int
    patch: tuple[int, int]
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, model: VisionTransformer, spec: ImageSpec) -> Self:
        """Geometry and pixel range of the images that a model takes."""
        low, high = spec.valid_range()
        return cls(spec.channels, spec.image_size, patch_size(model), low, high)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size // self.patch[0], self.image_size // self.patch[1]

    @property
    def num_patches(self) -> int:
        """P, patches of the full grid."""
        return self.shape[0] * self.shape[1]

    def to_patches(self, images: Tensor) -> Tensor:
        """``(B, ch, S, S)`` to ``(B, P, E)``."""
        return patchify(images, self.patch)

    def to_images(self, patches: Tensor) -> Tensor:
        """``(B, P, E)`` to ``(B, ch, S, S)``."""
        return unpatchify(patches, self.patch, self.shape)

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The valid range, laid out as a flattened patch: low and high, ``(E,)`` each."""
        each = self.patch[0] * self.patch[1]
        return self.low.to(device).repeat_interleave(each), self.high.to(device).repeat_interleave(each)

    def shifted(self, index: Tensor, shift: tuple[int, int]) -> Tensor:
        """Positions of the patches in `index` after a cyclic shift of the image by whole patches."""
        if shift == (0, 0):
            return index
        rows, columns = self.shape
        return (index // columns + shift[0]) % rows * columns + (index % columns + shift[1]) % columns
