"""Random views of a batch in one iteration of inversion: jitter shifts the images, ColorShift changes their colours.

ColorShift is from Plug-In Inversion (Ghiasi et al. 2022, arXiv 2201.12961); the formula is that of the authors' code.
The ensemble receives each channel of an image as ``(x - m) / s``, where m is uniform in [-r, r] and s is the
exponential of a number that is uniform in [-r, r]. Both are drawn again for each image, channel and iteration. The
paper uses r = 1. Departures: one setting is the r of both draws, and x is a normalised pixel. The prior, clipping and
the finished images use the unchanged pixels.

Letters: B images, L patches kept, E = channels x patch pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import InversionSettings


@dataclass(frozen=True)
class View:
    """One view of a batch; the default is the unchanged images.

    Attributes
    ----------
    shift
        Rows and columns of patches by which the image is cyclically shifted.
    mean, deviation
        ``(B, 1, E)`` fp32, m and s for each pixel of a patch; None: unchanged colours.
    """

    shift: tuple[int, int] = (0, 0)
    mean: Tensor | None = None
    deviation: Tensor | None = None

    @classmethod
    def draw(
        cls, count: int, grid: PatchGrid, settings: InversionSettings, generator: torch.Generator, device: torch.device
    ) -> View:
        """Draw a view by `inversion.jitter` and `inversion.color-shift`; a setting of 0 draws nothing.

        Parameters
        ----------
        count
            B, the number of images.
        generator
            CPU generator.
        device
            Device of the pixels.
        """
        shift = _random_shift(settings.jitter, generator)
        if settings.color_shift == 0:
            return cls(shift)
        draw = (2 * torch.rand(2, count, 1, grid.channels, generator=generator) - 1) * settings.color_shift
        mean, spread = _sent(draw, device).repeat_interleave(grid.patch[0] * grid.patch[1], dim=3)
        return cls(shift, mean, spread.exp())

    def of(self, pixels: Tensor) -> Tensor:
        """Return ``(B, L, E)`` pixels with the colours of this view."""
        return pixels if self.mean is None or self.deviation is None else (pixels - self.mean) / self.deviation

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Turn the ``(B, L, E)`` gradient with respect to the view into that with respect to the pixels."""
        return gradient if self.deviation is None else gradient / self.deviation


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy CPU values to the device without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _random_shift(reach: int, generator: torch.Generator) -> tuple[int, int]:
    if reach == 0:
        return 0, 0
    rows, columns = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return rows, columns
