"""Stage 1: sparse model inversion of the ensemble into synthetic images.

After SMI (arXiv 2510.27186): pixels start as noise and minimise ``CE(A(x), y) + a_tv TV(x) + a_2 |x|^2``
under Adam with clipping to the valid pixel range; at the stop iterations the patches with the least
[CLS] attention leave the token sequence for good. Departures, each because the authors' code does not
do what the paper says: a stopped patch is out of the graph and of the optimiser and keeps its pixels
bit for bit; the final kept set is the one that was inverted; total variation and loss are
sums over images, so that an image does not depend on the batch it is in; jitter shifts by
whole patches, so that each patch's gradient lands in that patch.

Letters: B images, C classes, P patches of the full grid, L patches kept, E = channels x patch pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmitr_flwr.ensemble import Ensemble
from fedmitr_flwr.grid import PatchGrid
from fedmitr_flwr.noise import random_images
from fedmitr_flwr.settings import InversionSettings


@dataclass(frozen=True)
class SyntheticImages:
    """What inversion made.

    Attributes
    ----------
    images
        ``(B, ch, S, S)`` fp32, normalised, within the valid range.
    labels
        ``(B,)`` int64, the class that each image was inverted for.
    kept
        ``(B, L)`` int64, sorted: the patches that were inverted to the end.
    loss
        ``(B,)`` fp32, CE(A(x), y) at the last iteration before its update.
    """

    images: Tensor
    labels: Tensor
    kept: Tensor
    loss: Tensor


class InversionDivergedError(RuntimeError):
    """The loss stopped being finite; the message names the iteration."""


def invert(
    ensemble: Ensemble,
    labels: Tensor,
    grid: PatchGrid,
    settings: InversionSettings,
    *,
    generator: torch.Generator,
    on_iteration: Callable[[int, Tensor], None] | None = None,
    on_stop: Callable[[int, Tensor, Tensor], None] | None = None,
) -> SyntheticImages:
    """Invert the ensemble into one image for each label.

    Parameters
    ----------
    ensemble
        Frozen teachers, on the device of `labels`.
    labels
        ``(B,)`` int64 target classes.
    grid
        Geometry and pixel range.
    settings
        Iterations, stop schedule, optimiser, priors.
    generator
        CPU generator of the starting noise and the jitter.
    on_iteration
        Called with the iteration, from 0, and the ``(B,)`` detached cross-entropies, still on the device.
    on_stop
        Called at each stop with the iteration, the ``(B, ch, S, S)`` images as they are then, and the ``(B, L)``
        patches that go on.

    Raises
    ------
    InversionDivergedError
        If pixels or loss are not finite, found at the end of a stage between two stops.
    """
    device, B = labels.device, len(labels)
    low, high = (_for_patches(bound, grid).to(device) for bound in (grid.low, grid.high))
    canvas = grid.to_patches(starting_images(B, grid, settings, generator)).to(device)  # (B, P, E)
    canvas = torch.minimum(torch.maximum(canvas, low), high)
    kept = torch.arange(grid.num_patches, device=device).repeat(B, 1)
    state = _Adam(canvas.clone(), settings)
    stops = dict(zip(settings.stops, settings.fractions, strict=True))
    loss = torch.zeros(B, device=device)
    for iteration in range(settings.iterations):
        stopping = iteration in stops
        index = _jitter(kept, grid, settings.jitter, generator)
        pixels = state.pixels.detach().requires_grad_(True)
        out = ensemble(pixels, index, attention=stopping, labels=labels)
        loss = -out.probabilities.gather(1, labels[:, None]).squeeze(1).clamp_min(1e-12).log()
        (gradient,) = torch.autograd.grad(loss.sum(), pixels)
        loss = loss.detach()
        if on_iteration is not None:
            on_iteration(iteration, loss)
        if stopping:
            assert out.attention is not None
            _check_finite(loss, gradient, iteration)
            canvas = scatter(canvas, kept, state.pixels)
            stay = most_attended(out.attention, stops[iteration])
            kept = kept.gather(1, stay)
            gradient = _take(gradient, stay)
            state.keep(stay)
            if on_stop is not None:
                on_stop(iteration, grid.to_images(canvas), kept)
        gradient = gradient + prior_gradient(scatter(canvas, kept, state.pixels), kept, grid, settings)
        state.step(gradient, low, high)
    _check_finite(loss, state.pixels, settings.iterations - 1)
    images = grid.to_images(scatter(canvas, kept, state.pixels))
    return SyntheticImages(images, labels, kept, loss)


def starting_images(count: int, grid: PatchGrid, settings: InversionSettings, generator: torch.Generator) -> Tensor:
    """Noise to start from, before it is clipped to the valid range; ``(count, ch, S, S)`` fp32 on the CPU."""
    if settings.start != "white":
        return random_images(settings.start, count, grid, generator)
    white = torch.randn(count, grid.channels, grid.image_size, grid.image_size, generator=generator)
    return white * settings.start_std


def most_attended(attention: Tensor, fraction: float) -> Tensor:
    """Places of the patches that stay when `fraction` of them with the least attention stops.

    Parameters
    ----------
    attention
        ``(B, L)``.
    fraction
        Between 0 and 1; ``floor(L (1 - fraction))`` patches stay, at least one (SMI: 46 of 196 after four times 0.3).

    Returns
    -------
    Tensor
        ``(B, L')`` int64 places into L, sorted; of equal attention the earlier place stays.
    """
    L = attention.shape[1]
    stay = max(1, math.floor(L * (1 - fraction) + 1e-9))
    order = attention.sort(dim=1, descending=True, stable=True).indices
    return order[:, :stay].sort(dim=1).values


def prior_gradient(canvas: Tensor, kept: Tensor, grid: PatchGrid, settings: InversionSettings) -> Tensor:
    """Gradient of ``a_tv TV(x) + a_2 mean(x^2)`` for the kept patches, in closed form.

    TV is DeepInversion's, for each image: the sum over four directions (right, down, both diagonals) of the L2 norm of
    the differences between neighbours. Stopped patches count as neighbours and get no gradient.

    Parameters
    ----------
    canvas
        ``(B, P, E)`` all patches.
    kept
        ``(B, L)``.

    Returns
    -------
    Tensor
        ``(B, L, E)``.
    """
    images = grid.to_images(canvas)
    gradient = torch.zeros_like(images)
    if settings.tv_weight > 0:
        for first, second in _neighbours(images.shape[-1]):
            difference = images[..., second[0], second[1]] - images[..., first[0], first[1]]
            norm = difference.flatten(1).norm(dim=1).clamp_min(1e-12)
            unit = difference * (settings.tv_weight / norm)[:, None, None, None]
            gradient[..., second[0], second[1]] += unit
            gradient[..., first[0], first[1]] -= unit
    if settings.l2_weight > 0:
        gradient += images * (2 * settings.l2_weight / images[0].numel())
    return _take(grid.to_patches(gradient), kept)


def scatter(canvas: Tensor, kept: Tensor, pixels: Tensor) -> Tensor:
    """Put ``(B, L, E)`` kept patches into a copy of the ``(B, P, E)`` canvas."""
    return canvas.scatter(1, kept[..., None].expand_as(pixels), pixels)


def _take(values: Tensor, places: Tensor) -> Tensor:
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def _neighbours(side: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    every, head, tail = slice(None), slice(0, side - 1), slice(1, side)
    return [
        ((every, head), (every, tail)),
        ((head, every), (tail, every)),
        ((head, head), (tail, tail)),
        ((head, tail), (tail, head)),
    ]


def _for_patches(bound: Tensor, grid: PatchGrid) -> Tensor:
    """A bound for each channel, ``(ch,)``, laid out as a flattened patch, ``(E,)``."""
    return bound.repeat_interleave(grid.patch[0] * grid.patch[1])


def _jitter(kept: Tensor, grid: PatchGrid, reach: int, generator: torch.Generator) -> Tensor:
    """Positions of the kept patches after a random cyclic shift of the image by whole patches."""
    if reach == 0:
        return kept
    rows, columns = grid.shape
    dy, dx = torch.randint(-reach, reach + 1, (2,), generator=generator).to(kept.device).unbind(0)
    return (kept // columns + dy) % rows * columns + (kept % columns + dx) % columns


def _check_finite(loss: Tensor, values: Tensor, iteration: int) -> None:
    if not bool(torch.isfinite(loss).all() & torch.isfinite(values).all()):
        raise InversionDivergedError(f"pixels or loss are not finite at inversion iteration {iteration}")


class _Adam:
    """Adam on the kept patches with clipping to the valid range, on plain tensors that shrink at each stop."""

    def __init__(self, pixels: Tensor, settings: InversionSettings) -> None:
        self.pixels = pixels
        self._mean, self._square = torch.zeros_like(pixels), torch.zeros_like(pixels)
        self._rate, self._betas, self._steps = settings.learning_rate, (settings.beta1, settings.beta2), 0

    def keep(self, stay: Tensor) -> None:
        """Forget all but the patches at places `stay`, ``(B, L')``."""
        self.pixels = _take(self.pixels, stay)
        self._mean, self._square = _take(self._mean, stay), _take(self._square, stay)

    def step(self, gradient: Tensor, low: Tensor, high: Tensor) -> None:
        """One update of the pixels with ``(B, L, E)`` gradients."""
        beta1, beta2 = self._betas
        self._steps += 1
        self._mean.lerp_(gradient, 1 - beta1)
        self._square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = math.sqrt(1 - beta2**self._steps)
        divisor = self._square.sqrt().div_(correction).add_(1e-8)
        rate = self._rate / (1 - beta1**self._steps)
        updated = self.pixels.addcdiv(self._mean, divisor, value=-rate)
        self.pixels = torch.minimum(torch.maximum(updated, low), high)
