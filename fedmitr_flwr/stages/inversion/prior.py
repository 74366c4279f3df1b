"""Total variation and pixel norm of images of which only some patches still change.

TV is DeepInversion's, for each image: the sum over four directions (right, down, both diagonals) of the L2 norm of the
differences between neighbours. A difference between two stopped pixels is the same in every iteration, so its
square is summed once; the others are looked at in windows, each kept patch with the ring of pixels around it.

Letters: B images, P patches of the full grid, L patches kept, E = channels x patch pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import InversionSettings

_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True)
class _Direction:
    """Pairs of neighbours in one direction; first and second end of each as slices of a window."""

    first: tuple[slice, slice]
    second: tuple[slice, slice]
    valid: Tensor  # (B, 1, h, w, L) 1 where both ends lie in the image and one in the patch, else 0
    share: Tensor  # like `valid`, but sqrt(1/2) where another kept patch has the same pair in its window
    constant: Tensor  # (B,) sum of squares over the pairs between stopped pixels


class Prior:
    """Gradient of ``a_tv TV(x) + a_2 mean(x^2)`` for the kept patches, in closed form.

    Parameters
    ----------
    canvas
        ``(B, P, E)`` all patches; the stopped ones are read here, once.
    kept
        ``(B, L)`` int64.
    """

    def __init__(self, canvas: Tensor, kept: Tensor, grid: PatchGrid, settings: InversionSettings) -> None:
        self._settings, self._grid = settings, grid
        self._pixels = canvas[0].numel()
        if settings.tv_weight == 0:
            return
        B, L = kept.shape
        (ph, pw), side, channels = grid.patch, grid.image_size, grid.channels
        padded = F.pad(grid.to_images(canvas), (1, 1, 1, 1))
        live = torch.zeros(B, grid.num_patches, device=kept.device).scatter(1, kept, 1.0)
        live = grid.to_images(live[..., None].expand(-1, -1, channels * ph * pw))[:, :1]
        state = F.pad(live + 1.0, (1, 1, 1, 1))  # 0 outside, 1 stopped, 2 kept
        # The images that change have a margin of a patch left and right, so that a patch's row is a row of `_padded`.
        width, down, right = side + 2 * pw, kept // grid.shape[1] * ph, kept % grid.shape[1]
        planes = torch.arange(B * channels, device=kept.device) * (side + 2) * width
        corner = down * width + right * pw + pw - 1  # of the window
        rows = torch.arange(ph + 2, device=kept.device)[:, None] * width
        window = (rows + torch.arange(pw + 2, device=kept.device))[:, :, None] + corner[:, None, None]  # (B, h, w, L)
        self._window = (window[:, None] + planes.view(B, channels, 1, 1, 1)).flatten()
        self._shape = (B, channels, ph + 2, pw + 2, L)
        first = (down + 1) * (width // pw) + right + 1
        each = torch.arange(ph, device=kept.device) * (width // pw) + planes.view(B, 1, channels, 1) // pw
        self._places = (first.view(B, L, 1, 1) + each).flatten()  # of the kept rows in the order of (B, L, E)
        self._padded = F.pad(padded, (pw - 1, pw - 1)).view(-1, pw)
        self._buffers = [padded.new_empty(self._window.shape) for _ in range(4)]
        window = window - (window // width) * (width - side - 2) - (pw - 1)  # in the narrower plane of the states
        states = state.flatten(1).gather(1, window.flatten(1)).view(B, 1, ph + 2, pw + 2, L)
        inside = F.pad(torch.ones(ph, pw, 1, device=kept.device), (0, 0, 1, 1, 1, 1))
        self._directions = [self._direction(step, states, inside, padded, state) for step in _DIRECTIONS]

    def _direction(
        self, step: tuple[int, int], states: Tensor, inside: Tensor, padded: Tensor, state: Tensor
    ) -> _Direction:
        first, second = _ends(step, *self._shape[2:4])
        a, b = states[:, :, *first], states[:, :, *second]
        touches = inside[first] + inside[second]
        valid = ((a > 0) & (b > 0) & (touches > 0)).float()
        shared = (a == 2) & (b == 2) & (touches < 2)
        share = torch.where(shared, valid * 0.5**0.5, valid)
        start, end = _ends(step, *padded.shape[-2:])
        still = (state[:, :, *start] == 1) & (state[:, :, *end] == 1)
        difference = padded[:, :, *end] - padded[:, :, *start]
        constant = (difference.square() * still).flatten(1).sum(1)
        return _Direction(first, second, valid.contiguous(), share.contiguous(), constant)

    def add_gradient(self, pixels: Tensor, gradient: Tensor) -> None:
        """Add the prior's gradient at the ``(B, L, E)`` kept pixels to `gradient`, in place."""
        if self._settings.l2_weight > 0:
            gradient.add_(pixels, alpha=2 * self._settings.l2_weight / self._pixels)
        if self._settings.tv_weight == 0:
            return
        self._padded.index_copy_(0, self._places, pixels.reshape(len(self._places), -1))
        torch.index_select(self._padded.view(-1), 0, self._window, out=self._buffers[0])
        windows, total = (buffer.view(self._shape) for buffer in self._buffers[:2])
        total.zero_()
        for way in self._directions:
            shape = (*self._shape[:2], *way.valid.shape[2:])
            difference = self._buffers[2][: math.prod(shape)].view(shape)
            torch.sub(windows[:, :, *way.second], windows[:, :, *way.first], out=difference)
            weighted = torch.mul(difference, way.share, out=self._buffers[3][: difference.numel()].view(shape))
            square = weighted.flatten(1).norm(dim=1).square() + way.constant
            scale = self._settings.tv_weight / square.sqrt().clamp_min(1e-12)
            factor = way.valid * scale.view(-1, 1, 1, 1, 1)
            total[:, :, *way.second].addcmul_(difference, factor)
            total[:, :, *way.first].addcmul_(difference, factor, value=-1)
        inner = total[:, :, 1:-1, 1:-1].permute(0, 4, 1, 2, 3)  # (B, L, channels, patch)
        gradient.view(inner.shape).add_(inner)


def _ends(step: tuple[int, int], height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """First and second ends of all pairs at distance `step` in a window."""
    down, right = step
    rows = slice(0, height - down), slice(down, height)
    columns = (slice(0, width - right), slice(right, width)) if right >= 0 else (slice(-right, width), slice(0, right))
    return (rows[0], columns[0]), (rows[1], columns[1])
