"""What an image of a run looks like: classes, channels, size and normalisation.

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
    """What server and clients must agree on to exchange models.

    Attributes
    ----------
    class_names
        Names of the C classes; their position is the label.
    channels
        1 (grey) or 3 (colour), or what an ``.npz`` file has.
    image_size
        Side S in pixels.
    mean, std
        Normalisation of each channel, for pixels in 0..1.

    Raises
    ------
    ValueError
        If there are no classes or names repeat, a size is not positive, or mean and std do not have
        one entry for each channel.
    """

    class_names: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.class_names or len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class names must be there and differ from each other: {self.class_names}")
        if self.channels < 1 or self.image_size < 1:
            raise ValueError(f"channels = {self.channels} and image_size = {self.image_size} must be at least 1")
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0.0:
            raise ValueError(f"mean {self.mean} and std {self.std} need {self.channels} entries, std above 0")

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    def normalise(self, images: Tensor) -> Tensor:
        """Turn pixels into the model's input.

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
        """Turn model input into pixels, the inverse of `normalise`; values outside 0..255 are clipped.

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
        """Lowest and highest normalised value of each channel, ``(ch,)`` float32: those of black and white."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (0.0 - mean) / std, (1.0 - mean) / std

    def to_json(self) -> str:
        """Write the spec as JSON, for a message from the server to its clients."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

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
            raise ValueError(f"not an image spec: {error!r}") from None

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)
