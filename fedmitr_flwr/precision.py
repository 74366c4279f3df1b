"""What the frozen teachers compute in: the rule behind ``inversion.precision = auto``."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]

NARROW = 128
"""Embedding widths up to this stay in fp32: for d = 64 bf16 was slower on every machine we tried."""


def compute_dtype(precision: Precision, width: int, device: torch.device) -> torch.dtype:
    """Choose fp32 or bf16 for inversion.

    `auto` is bf16 where the device multiplies bf16 matrices in hardware: CUDA devices that have it, CPUs with AMX. A
    CPU with AVX512-BF16 alone has half the rate of its fp32 units (one Xeon thread, DeiT-Tiny, 16 images, 47 tokens:
    262 ms an iteration against 157 ms; DeiT-Base, 4 images: 838 against 485), at every number of tokens.

    Parameters
    ----------
    precision
        `auto`, or the answer.
    width
        Embedding width D of the teachers.
    device
        Where they run.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast and width > NARROW else torch.float32
