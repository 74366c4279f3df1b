"""Gradient of total variation and pixel norm at the kept patches of a batch of images.

The total variation (TV) of an image is that of DeepInversion: the sum, over four directions (right, down, both
diagonals), of the L2 norm of the differences between neighbouring pixels. A difference between two stopped pixels is
the same in every iteration, so the sum of the squares of these is computed once. Every other difference lies in the
window of a kept patch: the patch and a ring of one pixel around it.

All images are held in one buffer with one plane for each image and channel. A plane has a margin of one row above and
below, and of one patch width left and right, so that its rows are cut into segments of one patch width, and each pixel
row of a patch is exactly one segment. The planes of an image of 2 x 2 patches of 3 x 3 pixels, and in it the window
(w) of patch b:

    row 0    ... ... ... ...      ... ..w www w..
    row 1    ... aaa bbb ...      ... ..w bbb w..
    row 2    ... aaa bbb ...      ... ..w bbb w..
    row 3    ... aaa bbb ...      ... ..w bbb w..
    row 4    ... ccc ddd ...      ... ..w www w..
    row 5    ... ccc ddd ...      ... ... ... ...
    row 6    ... ccc ddd ...      ... ... ... ...
    row 7    ... ... ... ...      ... ... ... ...
    segment   0   1   2   3        0   1   2   3

An iteration copies the kept pixels into their segments, gathers all windows, adds up the gradient of the four
directions in the windows, and returns the part that lies in the patches.

Letters: B images, P patches of the full grid, L patches kept, E = channels x patch pixels, S side of an image in
pixels, h x w pixels of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import InversionSettings

_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True)
class _Direction:
    """Pairs of neighbours in one direction; h' x w' pairs fit in a window."""

    first: tuple[slice, slice]  # where the first pixels of the pairs lie in a window
    second: tuple[slice, slice]  # where the second ones lie
    valid: Tensor  # (B, 1, h', w', L) 1 where both pixels lie in the image and at least one in the patch, else 0
    share: Tensor  # as `valid`, but sqrt(1/2) where the window of another kept patch has the same pair
    constant: Tensor  # (B,) sum of the squared differences between stopped pixels
    difference: Tensor  # (B, ch, h', w', L) in memory that all directions share
    weighted: Tensor  # likewise


class Prior:
    """Gradient of ``a_tv TV(x) + a_2 mean(x^2)`` with respect to the kept patches, in closed form.

    Parameters
    ----------
    canvas
        ``(B, P, E)`` all patches; the stopped ones are read here, once.
    kept
        ``(B, L)`` int64.
    grid, settings
        Geometry; weights a_tv and a_2.
    """

    def __init__(self, canvas: Tensor, kept: Tensor, grid: PatchGrid, settings: InversionSettings) -> None:
        self._settings = settings
        self._pixels = canvas[0].numel()
        if settings.tv_weight == 0:
            return
        B, L = kept.shape
        (ph, pw), side, channels, device = grid.patch, grid.image_size, grid.channels, kept.device
        images = F.pad(grid.to_images(canvas), (1, 1, 1, 1))  # (B, ch, S + 2, S + 2)
        live = torch.zeros(B, grid.num_patches, device=device).scatter(1, kept, 1.0)
        live = grid.to_images(live[..., None].expand(-1, -1, channels * ph * pw))[:, :1]
        state = F.pad(live + 1.0, (1, 1, 1, 1))  # (B, 1, S + 2, S + 2): 0 outside, 1 stopped, 2 kept
        self._segments = F.pad(images, (pw - 1, pw - 1)).reshape(-1, pw)  # the buffer, one segment a row

        plane_width = side + 2 * pw
        plane_start = torch.arange(B * channels, device=device) * (side + 2) * plane_width
        top, column = kept // grid.shape[1] * ph, kept % grid.shape[1]  # (B, L) first pixel row, column of the grid

        row_segments = plane_width // pw
        first_segment = (top + 1) * row_segments + column + 1  # (B, L) in its plane, of a patch's first row
        patch_rows = torch.arange(ph, device=device) * row_segments
        start_segment = plane_start.view(B, 1, channels, 1) // pw
        self._segment_index = (first_segment.view(B, L, 1, 1) + start_segment + patch_rows).flatten()  # as (B, L, E)

        window_row = torch.arange(ph + 2, device=device)[:, None, None] + top[:, None, None]  # (B, h, 1, L)
        left = column * pw + pw - 1
        window_column = torch.arange(pw + 2, device=device)[:, None] + left[:, None, None]  # (B, 1, w, L)
        in_plane = window_row * plane_width + window_column  # (B, h, w, L)
        in_state = window_row * (side + 2) + window_column - (pw - 1)  # the state has a margin of one pixel only
        self._window_index = (in_plane[:, None] + plane_start.view(B, channels, 1, 1, 1)).flatten()

        # L is the last axis of a window's tensors, so that operations on parts of a window run over long rows.
        self._windows = images.new_empty(B, channels, ph + 2, pw + 2, L)
        self._gradient = torch.empty_like(self._windows)
        self._scratch = [images.new_empty(self._windows.numel()) for _ in range(2)]
        states = state.flatten(1).gather(1, in_state.flatten(1)).view(B, 1, ph + 2, pw + 2, L)
        inside = F.pad(torch.ones(ph, pw, 1, device=device), (0, 0, 1, 1, 1, 1))  # (h, w, 1) 1 in the patch
        self._directions = [self._direction(step, states, inside, images, state) for step in _DIRECTIONS]

    def _direction(
        self, step: tuple[int, int], states: Tensor, inside: Tensor, images: Tensor, state: Tensor
    ) -> _Direction:
        """Find the pairs of one direction in all windows, and sum up those between stopped pixels."""
        first, second = _ends(step, *states.shape[2:4])
        a, b = states[:, :, *first], states[:, :, *second]
        touches = inside[first] + inside[second]  # how many of the two pixels lie in the patch
        valid = ((a > 0) & (b > 0) & (touches > 0)).float()
        shared = (a == 2) & (b == 2) & (touches < 2)
        share = torch.where(shared, valid * 0.5**0.5, valid)
        start, end = _ends(step, *images.shape[-2:])
        still = (state[:, :, *start] == 1) & (state[:, :, *end] == 1)
        constant = ((images[:, :, *end] - images[:, :, *start]).square() * still).flatten(1).sum(1)
        shape = self._windows[:, :, *first].shape
        difference, weighted = (memory[: shape.numel()].view(shape) for memory in self._scratch)
        return _Direction(first, second, valid.contiguous(), share.contiguous(), constant, difference, weighted)

    def add_gradient(self, pixels: Tensor, gradient: Tensor) -> None:
        """Add the prior's gradient at the ``(B, L, E)`` kept pixels to `gradient`, in place."""
        if self._settings.l2_weight > 0:
            gradient.add_(pixels, alpha=2 * self._settings.l2_weight / self._pixels)
        if self._settings.tv_weight == 0:
            return
        self._segments.index_copy_(0, self._segment_index, pixels.reshape(len(self._segment_index), -1))
        torch.index_select(self._segments.view(-1), 0, self._window_index, out=self._windows.view(-1))
        self._gradient.zero_()
        for way in self._directions:
            torch.sub(self._windows[:, :, *way.second], self._windows[:, :, *way.first], out=way.difference)
            torch.mul(way.difference, way.share, out=way.weighted)
            norm = (way.weighted.flatten(1).norm(dim=1).square() + way.constant).sqrt().clamp_min(1e-12)  # (B,)
            factor = way.valid * (self._settings.tv_weight / norm).view(-1, 1, 1, 1, 1)
            self._gradient[:, :, *way.second].addcmul_(way.difference, factor)
            self._gradient[:, :, *way.first].addcmul_(way.difference, factor, value=-1)
        in_patches = self._gradient[:, :, 1:-1, 1:-1].permute(0, 4, 1, 2, 3)  # (B, L, ch, ph, pw)
        gradient.view(in_patches.shape).add_(in_patches)


def _ends(step: tuple[int, int], height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return where the first and the second pixels of all pairs at distance `step` lie in height x width pixels."""
    down, right = step
    rows = slice(0, height - down), slice(down, height)
    columns = (slice(0, width - right), slice(right, width)) if right >= 0 else (slice(-right, width), slice(0, right))
    return (rows[0], columns[0]), (rows[1], columns[1])
