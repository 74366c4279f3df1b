"""Building blocks of the passes in `passes.py`, and the buffers that they write to.

Letters: T teachers, M tokens of all images, D embedding.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


class Arena:
    """Reusable buffers by name; each grows to the largest size requested so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a buffer on the device of `like`; the same name gives the same memory, and it is not cleared."""
        key, size = (name, dtype, like.device), math.prod(shape)
        found = self._buffers.get(key)
        if found is None or len(found) < size:
            found = self._buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
        return found[:size].view(shape)

    @property
    def buffers(self) -> list[Tensor]:
        """All buffers allocated so far."""
        return list(self._buffers.values())

    @property
    def bytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write ``x W + b`` to `out`, with x ``(T, M, in)``, W ``(T, in, out)`` and b ``(T, 1, out)``."""
    if len(x) == 1:
        if bias is None:
            torch.mm(x[0], weight[0], out=out[0])
        else:
            torch.addmm(bias[0, 0], x[0], weight[0], out=out[0])
    elif bias is None:
        torch.bmm(x, weight, out=out)
    else:
        torch.baddbmm(bias, x, weight, out=out)
    return out


def add_linear(x: Tensor, a: Tensor, weight: Tensor, bias: Tensor, out: Tensor, scratch: Arena) -> Tensor:
    """Write ``x + a W + b`` to `out`; x and out are fp32, a and W may be bf16."""
    torch.add(x, bias, out=out)
    if a.dtype == torch.float32:
        if len(a) == 1:
            torch.addmm(out[0], a[0], weight[0], out=out[0])
        else:
            torch.baddbmm(out, a, weight, out=out)
        return out
    return out.add_(linear(a, weight, None, scratch.take("residual", tuple(out.shape), out, a.dtype)))


def layer_norm(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Normalise `x` without an affine part.

    Returns
    -------
    normalised
        ``(T, M, D)`` in `dtype`.
    statistics
        Mean and inverse standard deviation, ``(T, M, 1)`` each.
    """
    out, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], *_no_affine(x.shape[-1], x.device), eps)
    return out.to(dtype), (mean, inverse)


@cache
def _no_affine(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ones and zeros: PyTorch's CPU kernel takes twice as long without an affine part."""
    return torch.ones(width, device=device), torch.zeros(width, device=device)


def layer_norm_backward(g: Tensor, x: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """Return the gradient with respect to `x`, given that with respect to the normalised values and the statistics."""
    mask = [True, False, False]
    out: Tensor = torch.ops.aten.native_layer_norm_backward(g, x, x.shape[-1:], *statistics, None, None, mask)[0]
    return out


def softmax(scores: Tensor, out: Tensor) -> None:
    """Write the softmax over the last axis to `out`, which has the dtype of `scores`.

    It is computed in fp32 for every dtype, because PyTorch's bf16 softmax is slower on a CPU
    (`benchmarks/results/engine-constants.md`).
    """
    if scores.dtype == torch.float32:
        torch.softmax(scores, -1, out=out)
    else:
        out.copy_(scores.float().softmax(-1))
