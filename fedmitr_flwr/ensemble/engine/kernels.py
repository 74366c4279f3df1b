"""Steps that the passes of `passes.py` are made of, and the memory that they write to.

Letters: T teachers, M tokens of all images, D embedding.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


class Arena:
    """Buffers by name that grow to the largest size asked for."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a buffer with what it held before, on the device of `like`; the same memory for the same name."""
        key, size = (name, dtype, like.device), math.prod(shape)
        found = self._buffers.get(key)
        if found is None or len(found) < size:
            found = self._buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
        return found[:size].view(shape)

    @property
    def buffers(self) -> list[Tensor]:
        """All buffers."""
        return list(self._buffers.values())

    @property
    def bytes(self) -> int:
        """Size of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``x W + b`` of ``(T, M, in)``, ``(T, in, out)`` and ``(T, 1, out)`` into `out`."""
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
    """``x + a W + b`` into `out`, with x and out fp32."""
    torch.add(x, bias, out=out)
    if a.dtype == torch.float32:
        if len(a) == 1:
            torch.addmm(out[0], a[0], weight[0], out=out[0])
        else:
            torch.baddbmm(out, a, weight, out=out)
        return out
    return out.add_(linear(a, weight, None, scratch.take("residual", tuple(out.shape), out, a.dtype)))


def layer_norm(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Normalised `x` in `dtype`, without affine part; its mean and inverse deviation, ``(T, M, 1)``."""
    out, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], *_no_affine(x.shape[-1], x.device), eps)
    return out.to(dtype), (mean, inverse)


@cache
def _no_affine(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ones and zeros: with none at all PyTorch's CPU kernel takes twice as long."""
    return torch.ones(width, device=device), torch.zeros(width, device=device)


def layer_norm_backward(g: Tensor, x: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """Gradient for `x`, given that of the normalised and what `layer_norm` returned beside it."""
    mask = [True, False, False]
    out: Tensor = torch.ops.aten.native_layer_norm_backward(g, x, x.shape[-1:], *statistics, None, None, mask)[0]
    return out


def softmax(scores: Tensor, out: Tensor) -> None:
    """Softmax over the last axis into `out`, of the same dtype.

    In fp32 whatever the dtype: PyTorch's bf16 softmax takes seven times as long on a CPU (47 tokens, Zen 4).
    """
    if scores.dtype == torch.float32:
        torch.softmax(scores, -1, out=out)
    else:
        out.copy_(scores.float().softmax(-1))
