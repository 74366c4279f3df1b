"""What the frozen teachers compute in: the rule behind ``inversion.precision = auto``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from fedmitr_flwr.settings import Precision

NARROW = 128
"""Embedding widths up to this stay in fp32: bf16 gains little there (D = 64: 1.2 to 1.5 times on a Zen 4, nothing on
the Xeons we tried), and so small models give the same images on all machines."""


def compute_dtype(precision: Precision, width: int, device: torch.device) -> torch.dtype:
    """Choose fp32 or bf16 for inversion.

    `auto` is bf16 where the device multiplies bf16 matrices in hardware: CUDA devices that have it, CPUs with AMX, and
    AMD's with AVX512-BF16 (Zen 4 and later), whose bf16 units are twice as fast as their fp32 ones: one thread, at 65
    and 15 tokens, 1.8 and 1.4 times at D = 192, 1.9 and 1.8 times at D = 384. Intel's with AVX512-BF16 and without AMX
    have half the rate of fp32 (one Xeon thread, DeiT-Tiny, 16 images, 47 tokens: 262 ms an iteration against 157 ms;
    DeiT-Base, 4 images: 838 against 485), at every number of tokens.

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
        amd = torch.cpu._is_avx512_bf16_supported() and _made_by_amd()
        fast = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or amd)
    return torch.bfloat16 if fast and width > NARROW else torch.float32


@cache
def _made_by_amd() -> bool:
    about = Path("/proc/cpuinfo")
    return about.is_file() and "AuthenticAMD" in about.read_text()
