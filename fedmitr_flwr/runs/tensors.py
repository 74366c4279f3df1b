"""Weights on disk: safetensors files, written whole or not at all, and a checksum of their content."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from fedmitr_flwr.runs.atomic import atomic_path
from fedmitr_flwr.runs.direct_io import open_uncached

# Names of the safetensors format.
_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, readable to whom the umask allows.

    Not by safetensors' own writers: they copy all tensors into one or two further buffers, where a server that takes
    hundreds of uploads should hold each one once; they neither sync nor raise an OSError when the disk is full, and
    let nobody but the owner read the file.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    # Wider types first, as the format's readers expect: each tensor then begins at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for key, value in ordered:
        start, end = end, end + value.numel() * value.element_size()
        header[key] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open_uncached(temporary) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in ordered:
            file.write(_bytes(value))


class StoredState(Mapping[str, Tensor]):
    """Weights in a safetensors file, read tensor by tensor when they are asked for, floating-point ones as fp32.

    So hundreds of client models need not be in memory beside the teachers that are made from them.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path = path
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, "pt") as file:
            value: Tensor = file.get_tensor(name)
        return value.float() if value.is_floating_point() else value

    def read(self) -> dict[str, Tensor]:
        """All tensors, with the file opened once; fp32 ones may lie in the file's pages: don't write to them."""
        with safe_open(self._path, "pt") as file:
            state = {name: file.get_tensor(name) for name in self._names}
        return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def checksum(state: Mapping[str, Tensor]) -> str:
    """Return a checksum over names, dtypes, shapes and values, whatever the order of the keys.

    XXH3 with 128 bits, ten times faster than SHA-256. It finds every accident; it is no proof against somebody who can
    write to the files, who could write another checksum too.
    """
    digest = xxhash.xxh3_128()
    for key in sorted(state):
        value = state[key]
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    """The values in memory order, without a copy where they lie that way already."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
