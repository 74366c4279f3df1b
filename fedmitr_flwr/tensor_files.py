"""Weights on disk: safetensors files, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from fedmitr_flwr.atomic import atomic_path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, readable to whom the umask allows.

    Not by safetensors' own ``save_file``: it neither syncs nor raises an OSError when the disk is full, and lets
    nobody but the owner read the file.
    """
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    content = save(whole, None if metadata is None else dict(metadata))
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
