"""Read and write safetensors files with a checksum of all that they hold.

The checksum stands in the metadata of the file's header and covers the tensors and the other metadata. A file that was
written by another program, or by a version that wrote no checksum, is read without this check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from fedmitr_flwr.runs.atomic import CHECKSUM, DamagedFileError, atomic_path
from fedmitr_flwr.runs.direct_io import open_uncached

# Names of dtypes in the safetensors format.
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file atomically, with the file permissions of the umask, and return its checksum.

    The writers of the safetensors package are not used for three reasons. They copy all tensors to one or two more
    buffers, while a server with hundreds of uploads should hold each upload once. They do not sync, and do not raise an
    OSError if the disk is full. They make the file readable only for its owner.
    """
    about = dict(metadata or {})
    about[CHECKSUM] = checksum(tensors, about)
    header: dict[str, object] = {"__metadata__": about}
    end = 0
    # Readers expect each tensor to start at a multiple of its item size, so wider dtypes come first.
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
    return about[CHECKSUM]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and check it.

    Returns
    -------
    tensors
        By name, with the dtypes of the file. Do not write to them: they may share memory with the mapped file.
    metadata
        The texts in the header, with the checksum if there is one.

    Raises
    ------
    OSError
        If the file cannot be opened.
    DamagedFileError
        If it is not a safetensors file or differs from its checksum.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
    except OSError:
        raise
    except Exception as error:  # safetensors and torch raise many types of errors for damaged headers
        raise DamagedFileError(path, f"cannot be read as safetensors ({str(error)[:200]})") from None
    written = metadata.get(CHECKSUM)
    about = {key: value for key, value in metadata.items() if key != CHECKSUM}
    # The checksum in uploads of earlier versions covers the tensors alone.
    if written is not None and written != checksum(tensors, about) and written != checksum(tensors):
        raise DamagedFileError(path, "is damaged: its content differs from its checksum")
    return tensors, metadata


class StoredState(Mapping[str, Tensor]):
    """Weights in a safetensors file. Each access reads one tensor; floating-point tensors are returned as fp32.

    The weights of hundreds of clients therefore do not take memory in addition to the teachers made from them.

    Parameters
    ----------
    path
        The file.
    names
        Names of its tensors.
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

    def read(self, needed: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Return the tensors of all names for which `needed` is true.

        Do not write to them: fp32 tensors may share memory with the mapped file.
        """
        with safe_open(self._path, "pt") as file:
            state = {name: file.get_tensor(name) for name in self._names if needed(name)}
        return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def checksum(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Return a checksum over names, dtypes, shapes, values and texts; the order of the keys does not matter.

    The checksum is the 128-bit XXH3, which is ten times faster than SHA-256. It detects accidental changes. It does not
    protect against a person who can write to the files, because that person could change the checksum too.
    """
    digest = xxhash.xxh3_128()
    for key in sorted(state):
        value = state[key]
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        digest.update(_bytes(value))
    if metadata:
        digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    """Return the values in memory order, without a copy if the tensor is contiguous on the CPU."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
