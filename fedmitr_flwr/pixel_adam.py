"""The optimiser of inversion: Adam on the pixels of the patches that are still inverted.

Letters: B images, L patches kept, E = channels x patch pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmitr_flwr.settings import InversionSettings


class PixelAdam:
    """Adam with clipping to the valid range, on plain tensors that shrink at each stop.

    Parameters
    ----------
    pixels
        ``(B, L, E)`` fp32, changed in place; `pixels` holds them.
    settings
        Learning rate and betas.
    """

    def __init__(self, pixels: Tensor, settings: InversionSettings) -> None:
        self.pixels = pixels
        self._mean, self._square = torch.zeros_like(pixels), torch.zeros_like(pixels)
        self._rate, self._betas, self._steps = settings.learning_rate, (settings.beta1, settings.beta2), 0

    def keep(self, stay: Tensor) -> None:
        """Forget all but the patches at places `stay`, ``(B, L')``."""
        self.pixels = take(self.pixels, stay)
        self._mean, self._square = take(self._mean, stay), take(self._square, stay)

    def step(self, gradient: Tensor, low: Tensor, high: Tensor) -> None:
        """One update of the pixels, in place, with ``(B, L, E)`` gradients, which are overwritten."""
        beta1, beta2 = self._betas
        self._steps += 1
        self._mean.lerp_(gradient, 1 - beta1)
        self._square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = math.sqrt(1 - beta2**self._steps)
        divisor = torch.sqrt(self._square, out=gradient).div_(correction).add_(1e-8)
        self.pixels.addcdiv_(self._mean, divisor, value=-self._rate / (1 - beta1**self._steps))
        torch.minimum(torch.maximum(self.pixels, low, out=self.pixels), high, out=self.pixels)


def take(values: Tensor, places: Tensor) -> Tensor:
    """Gather the patches at `places`, ``(B, L')`` int64, of ``(B, L, E)`` values."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))
