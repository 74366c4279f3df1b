"""Specification of the images of a run: classes, channels, size and normalisation.

Dimension letters: B images, C classes; ch channels, S side of the square images.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSpec:
    """Properties of the images that must be the same on the server and on all clients.

    Attributes
    ----------
    class_names
        Names of the C classes; the position of a name is the label.
    channels
        1 (grey) or 3 (colour); an ``.npz`` file may have another number.
    image_size
        Side S in pixels.
    mean, std
        Mean and standard deviation of each channel for the normalisation, for pixels from 0 to 1.

    Raises
    ------
    ValueError
        If there are no classes, a name occurs twice, a size is not positive, a standard deviation is not above 0, or
        mean and std do not have one entry for each channel.
    """

    class_names: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.class_names or len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class_names must have at least one name and no name twice: {self.class_names}")
        if self.channels < 1 or self.image_size < 1:
            raise ValueError(f"channels = {self.channels} and image_size = {self.image_size} must be at least 1")
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0.0:
            raise ValueError(
                f"mean {self.mean} and std {self.std} must have {self.channels} entries, and std must be above 0"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    def normalise(self, images: Tensor) -> Tensor:
        """Convert pixels to the model's input.

        Parameters
        ----------
        images
            ``(B, ch, S, S)`` uint8, on any device.

        Returns
        -------
        Tensor
            ``(B, ch, S, S)`` float32: ``(pixel / 255 - mean) / std``.
        """
        return (images.to(torch.float32) / 255.0 - self._per_channel(self.mean, images)) / self._per_channel(
            self.std, images
        )

    def denormalise(self, images: Tensor) -> Tensor:
        """Convert model input to pixels, the inverse of `normalise`; values outside 0..255 are clipped.

        Parameters
        ----------
        images
            ``(B, ch, S, S)`` of a floating dtype.

        Returns
        -------
        Tensor
            ``(B, ch, S, S)`` uint8.
        """
        pixels = images.to(torch.float32) * self._per_channel(self.std, images) + self._per_channel(self.mean, images)
        return (pixels * 255.0).round().clamp(0, 255).to(torch.uint8)

    def valid_range(self) -> tuple[Tensor, Tensor]:
        """Return the normalised values of black and white for each channel, both ``(ch,)`` float32."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (0.0 - mean) / std, (1.0 - mean) / std

    def to_json(self) -> str:
        """Return the spec as JSON, for messages from the server to the clients."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the spec that `to_json` wrote.

        Raises
        ------
        ValueError
            If a field is missing or does not fit the others.
        """
        try:
            raw = json.loads(text)
            return cls(
                class_names=tuple(str(name) for name in raw["class_names"]),
                channels=int(raw["channels"]),
                image_size=int(raw["image_size"]),
                mean=tuple(float(value) for value in raw["mean"]),
                std=tuple(float(value) for value in raw["std"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the text is not an image spec: {error!r}") from None

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)
