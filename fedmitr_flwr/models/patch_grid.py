"""Divide images into patches and join patches to images.

Letters: B images, ch channels, S side in pixels, P patches of the full grid, E pixels of a patch (all channels).
"""

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
        Number of channels and side in pixels of the square images.
    patch
        Height and width of a patch in pixels.
    low, high
        ``(ch,)`` lowest and highest valid value of a normalised pixel.
    """

    channels: int
    image_size: int
    patch: tuple[int, int]
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, model: VisionTransformer, spec: ImageSpec) -> Self:
        """Return the geometry and pixel range of a model's input images."""
        low, high = spec.valid_range()
        return cls(spec.channels, spec.image_size, patch_size(model), low, high)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns of patches."""
        return self.image_size // self.patch[0], self.image_size // self.patch[1]

    @property
    def num_patches(self) -> int:
        """Number of patches P of the full grid."""
        return self.shape[0] * self.shape[1]

    def to_patches(self, images: Tensor) -> Tensor:
        """Cut ``(B, ch, S, S)`` images into ``(B, P, E)`` patches."""
        return patchify(images, self.patch)

    def to_images(self, patches: Tensor) -> Tensor:
        """Join ``(B, P, E)`` patches to ``(B, ch, S, S)`` images."""
        return unpatchify(patches, self.patch, self.shape)

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest valid value of each pixel of a flattened patch, ``(E,)`` each."""
        each = self.patch[0] * self.patch[1]
        return self.low.to(device).repeat_interleave(each), self.high.to(device).repeat_interleave(each)

    def shifted(self, index: Tensor, shift: tuple[int, int]) -> Tensor:
        """Return the positions of the patches `index` after a cyclic shift by rows and columns of patches."""
        if shift == (0, 0):
            return index
        rows, columns = self.shape
        return (index // columns + shift[0]) % rows * columns + (index % columns + shift[1]) % columns
