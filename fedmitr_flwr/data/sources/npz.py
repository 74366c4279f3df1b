"""Images in one NumPy archive: `npz:PATH`.

Required arrays: `images` ``(N, S, S)`` or ``(N, S, S, ch)`` uint8, and `label` ``(N,)`` integers from 0. Optional
arrays: `class_names` ``(C,)`` strings, `domain` ``(N,)`` integers or strings, `domain_names` strings, and `test`
``(N,)`` bool. Arrays of objects are refused, because unpickling them can run code.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmitr_flwr.data.images import ArrayReader, Labels
from fedmitr_flwr.data.presets import default_geometry
from fedmitr_flwr.data.sources.raw import TEST, TRAIN, Header, Origin, RawSource

Arrays = dict[str, NDArray[np.generic]]
KNOWN = ("images", "label", "class_names", "domain", "domain_names", "test")


def npz_header(path: Path, origin: Origin) -> Header:
    """Read the classes and the image shape without decompressing the images.

    Raises
    ------
    SettingsError
        If the file does not exist, is not an archive, or has invalid arrays.
    """
    shape, dtype = _shape_of_images(path, origin)
    arrays = _read(path, origin, [name for name in KNOWN if name != "images"])
    return _header(shape, dtype, arrays, origin)


def load_npz(path: Path, origin: Origin) -> RawSource:
    """Load an archive into memory.

    Raises
    ------
    SettingsError
        If the file does not exist, is not an archive, or has invalid arrays.
    """
    shape, dtype = _shape_of_images(path, origin)
    arrays = _read(path, origin, KNOWN)
    header = _header(shape, dtype, arrays, origin)
    images = arrays["images"].astype(np.uint8, copy=False)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    labels = arrays["label"].astype(np.int64)
    test = arrays.get("test", np.zeros(len(labels), np.bool_)).astype(np.bool_)
    domain = arrays.get("domain")
    if domain is not None and "domain_names" in arrays:
        domain = arrays["domain_names"][domain.astype(np.int64)]
    return RawSource(
        header,
        ArrayReader(images),
        labels,
        np.where(test, TEST, TRAIN).astype(np.int8),
        {} if domain is None else {"domain": domain},
    )


def _shape_of_images(path: Path, origin: Origin) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    if not path.is_file():
        raise origin.error(f"the file {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("images.npy") as member:
            version = np.lib.format.read_magic(member)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = reader(member)
            return shape, dtype
    except KeyError:
        raise origin.error(f"{path} has no array `images`; `images` and `label` are required") from None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise origin.error(f"{path} is not a readable .npz archive: {error}") from None


def _read(path: Path, origin: Origin, names: list[str] | tuple[str, ...]) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names if name in archive.files}
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise origin.error(f"{path} cannot be read (arrays of objects are refused): {error}") from None


def _header(shape: tuple[int, ...], dtype: np.dtype[np.generic], arrays: Arrays, origin: Origin) -> Header:
    if dtype != np.uint8 or len(shape) not in (3, 4) or shape[1] != shape[2] or 0 in shape:
        allowed = "array `images` must be uint8 of shape (N, S, S) or (N, S, S, channels)"
        raise origin.error(f"{allowed}, but is {dtype} of shape {shape}")
    if "label" not in arrays:
        raise origin.error("has no array `label`; `images` and `label` are required")
    for name, kinds in (("label", "iu"), ("domain", "iuU"), ("test", "b")):
        column = arrays.get(name)
        if column is not None and (column.shape != shape[:1] or column.dtype.kind not in kinds):
            words = {"iu": "integers", "iuU": "integers or strings", "b": "booleans"}[kinds]
            allowed = f"array `{name}` must be {words} of shape ({shape[0]},)"
            raise origin.error(f"{allowed}, but is {column.dtype} of shape {column.shape}")
    _check_codes(arrays, "domain", "domain_names", origin)
    _check_codes(arrays, "label", "class_names", origin)
    labels: Labels = arrays["label"].astype(np.int64)
    named = "class_names" in arrays
    names = arrays["class_names"].tolist() if named else range(int(labels.max()) + 1)
    return Header(
        origin,
        tuple(str(name) for name in names),
        named,
        default_geometry(shape[3] if len(shape) == 4 else 1, shape[1]),
    )


def _check_codes(arrays: Arrays, column: str, names: str, origin: Origin) -> None:
    """Check that integers are at least 0 and, if there are names, below their number."""
    codes = arrays.get(column)
    if codes is None or codes.dtype.kind == "U":
        return
    low, high = int(codes.astype(np.int64).min()), int(codes.astype(np.int64).max())
    limit = len(arrays[names]) if names in arrays else high + 1
    if low < 0 or high >= limit:
        raise origin.error(
            f"array `{column}` must have values from 0 to {limit - 1}, but has values from {low} to {high}"
        )
