"""Write files atomically: write a temporary file, sync it, rename it.

A JSON document that a later process reads can carry a checksum, so that a changed byte is noticed. The checksum detects
accidents. It does not protect against a person who can write to the files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

TEMPORARY_SUFFIX = ".tmp"
CHECKSUM = "checksum"  # key of the checksum in JSON documents and in the metadata of safetensors files


class DamagedFileError(ValueError):
    """A file is not what was written; the message names the file and what is wrong."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"{path} {problem}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to `path` if the block ends without an error.

    The content is synced to the disk before the file is renamed. After a crash or with a full disk, `path` is the old
    file or does not exist, and is never an incomplete new file. The temporary file is in the same directory, has a
    hidden name that ends in ``.tmp``, and is removed if the block raises.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}"
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Json) -> None:
    """Write a JSON document atomically; floats that are not finite are written as null."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_checked_json(path: Path, value: Mapping[str, Json]) -> None:
    """Write a JSON object atomically, with a checksum of its other entries as its last entry."""
    write_json(path, {**value, CHECKSUM: json_checksum(value)})


def read_checked_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that `write_checked_json` wrote, without its checksum.

    A file without a checksum is accepted, because earlier versions wrote none.

    Raises
    ------
    OSError
        If the file cannot be read.
    DamagedFileError
        If the file is not a JSON object or differs from its checksum.
    """
    content = read_json_object(path)
    written = content.pop(CHECKSUM, None)
    if written is not None and written != json_checksum(content):
        raise DamagedFileError(path, "is damaged: its content differs from its checksum")
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    OSError
        If the file cannot be read.
    DamagedFileError
        If the file is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"is not valid JSON ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise DamagedFileError(path, "is not a JSON object")
    return content


def json_checksum(value: Json) -> str:
    """Return a checksum of a JSON value; the order of keys does not matter."""
    return xxhash.xxh3_128(json.dumps(_finite(value), sort_keys=True).encode()).hexdigest()


def _finite(value: Json) -> Json:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
