"""How the ensemble sees a batch of images in one iteration of inversion: moved, and in other colours.

ColorShift is that of Plug-In Inversion (Ghiasi et al. 2022, arXiv 2201.12961): each image's channels are seen as
``(x - m) / s`` with ``m`` uniform in [-r, r] and ``s = exp(u)``, u uniform in [-r, r], drawn anew for each image,
channel and iteration; the authors have r = 1, and the formula is that of their published code. Departures: r is one
setting for both, and the pixels that it changes are normalised ones, as everything here. Prior, clipping and the
finished image know nothing of it.

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
    """One look at a batch; without arguments, at the images as they are.

    Attributes
    ----------
    shift
        Rows and columns of patches by which the image is cyclically shifted.
    mean, deviation
        ``(B, 1, E)`` fp32, m and s of each pixel of a patch; None: the colours as they are.
    """

    shift: tuple[int, int] = (0, 0)
    mean: Tensor | None = None
    deviation: Tensor | None = None

    @classmethod
    def draw(
        cls, count: int, grid: PatchGrid, settings: InversionSettings, generator: torch.Generator, device: torch.device
    ) -> View:
        """Draw what `inversion.jitter` and `inversion.color-shift` ask for; nothing is drawn for what is off.

        Parameters
        ----------
        count
            B.
        generator
            CPU generator.
        device
            Of the pixels.
        """
        shift = _random_shift(settings.jitter, generator)
        if settings.color_shift == 0:
            return cls(shift)
        draw = (2 * torch.rand(2, count, 1, grid.channels, generator=generator) - 1) * settings.color_shift
        mean, spread = _sent(draw, device).repeat_interleave(grid.patch[0] * grid.patch[1], dim=3)
        return cls(shift, mean, spread.exp())

    def of(self, pixels: Tensor) -> Tensor:
        """What is seen of ``(B, L, E)`` pixels."""
        return pixels if self.mean is None or self.deviation is None else (pixels - self.mean) / self.deviation

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Gradient for the pixels, given the ``(B, L, E)`` one for what is seen of them."""
        return gradient if self.deviation is None else gradient / self.deviation


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on the device, which is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _random_shift(reach: int, generator: torch.Generator) -> tuple[int, int]:
    if reach == 0:
        return 0, 0
    rows, columns = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return rows, columns
