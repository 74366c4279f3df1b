"""Optimiser of inversion: Adam on the pixels of the patches that have not been stopped.

Letters: B images, L patches kept, E = channels x patch pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmitr_flwr.settings import InversionSettings


class PixelAdam:
    """Adam on the pixels of the kept patches, with clipping to the valid range.

    Parameters
    ----------
    pixels
        ``(B, L, E)`` fp32, updated in place; the attribute `pixels` holds the current ones.
    settings
        Learning rate and betas.
    """

    def __init__(self, pixels: Tensor, settings: InversionSettings) -> None:
        self.pixels = pixels
        self._mean, self._square = torch.zeros_like(pixels), torch.zeros_like(pixels)
        self._rate, self._betas, self._steps = settings.learning_rate, (settings.beta1, settings.beta2), 0

    def keep(self, stay: Tensor) -> None:
        """Drop all patches but those at the places `stay`, ``(B, L')`` int64 into L."""
        self.pixels = take(self.pixels, stay)
        self._mean, self._square = take(self._mean, stay), take(self._square, stay)

    def step(self, gradient: Tensor, low: Tensor, high: Tensor) -> None:
        """Update the pixels once, in place, and clip them.

        Parameters
        ----------
        gradient
            ``(B, L, E)``; overwritten.
        low, high
            ``(E,)`` valid range.
        """
        self._steps += 1
        correction, rate = self._scalars(self._steps)
        divisor = self._moments(gradient).div_(correction).add_(1e-8)
        self.pixels.addcdiv_(self._mean, divisor, value=rate)
        self._clip(low, high)

    def step_by(self, scalars: Tensor, gradient: Tensor, low: Tensor, high: Tensor) -> None:
        """Do the same as `step` with bias corrections from the device: `scalars` is a ``(2,)`` row of `table`."""
        divisor = self._moments(gradient).div_(scalars[0]).add_(1e-8)
        self.pixels.addcdiv_(self._mean * scalars[1], divisor)
        self._clip(low, high)

    def table(self, count: int) -> Tensor:
        """Return the bias corrections of the next `count` steps for `step_by`, ``(count, 2)`` on the CPU."""
        return torch.tensor([self._scalars(self._steps + number) for number in range(1, count + 1)])

    def counted(self) -> None:
        """Count one step of `step_by`, which does not count itself."""
        self._steps += 1

    def _scalars(self, steps: int) -> tuple[float, float]:
        """Return the bias correction of the divisor, and the negative learning rate with that of the mean."""
        beta1, beta2 = self._betas
        return math.sqrt(1 - beta2**steps), -self._rate / (1 - beta1**steps)

    def _moments(self, gradient: Tensor) -> Tensor:
        """Update both moments; return the root of the second one, in the memory of `gradient`."""
        beta1, beta2 = self._betas
        self._mean.lerp_(gradient, 1 - beta1)
        self._square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return torch.sqrt(self._square, out=gradient)

    def _clip(self, low: Tensor, high: Tensor) -> None:
        torch.minimum(torch.maximum(self.pixels, low, out=self.pixels), high, out=self.pixels)


def scatter(canvas: Tensor, kept: Tensor, pixels: Tensor) -> Tensor:
    """Return a copy of the ``(B, P, E)`` canvas with ``(B, L, E)`` pixels at the ``(B, L)`` patches `kept`."""
    return canvas.scatter(1, kept[..., None].expand_as(pixels), pixels)


def take(values: Tensor, places: Tensor) -> Tensor:
    """Return the ``(B, L', E)`` patches at `places`, ``(B, L')`` int64, of ``(B, L, E)`` values."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))
