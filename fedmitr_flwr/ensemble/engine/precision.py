"""Choose the number format in which the frozen teachers compute (`inversion.precision`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from fedmitr_flwr.settings import Precision

NARROW = 128
"""Up to this embedding width, `auto` chooses fp32.

bf16 gains little there (`benchmarks/results/engine-constants.md`), and with fp32 small models give the same images on
all machines.
"""


def compute_dtype(precision: Precision, width: int, device: torch.device) -> torch.dtype:
    """Choose fp32 or bf16 for inversion.

    `auto` chooses bf16 for models wider than `NARROW` on devices whose bf16 matrix products are faster than fp32: CUDA
    devices with bf16 hardware, CPUs with AMX, and AMD CPUs with AVX512-BF16 (Zen 4 and later). Intel CPUs with
    AVX512-BF16 but without AMX multiply bf16 at half the rate of fp32, so they get fp32. The measurements are in
    `benchmarks/results/engine-constants.md`.

    Parameters
    ----------
    precision
        `fp32` and `bf16` are returned as they are; `auto` applies the rule above.
    width
        Embedding width D of the teachers.
    device
        Device that the teachers run on.
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
