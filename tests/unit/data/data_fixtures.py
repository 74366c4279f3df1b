"""Small image sources for the tests of data: files made in a temporary folder, and a set of labels only."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fedmitr_flwr.data import ImageSet
from fedmitr_flwr.data.images import ArrayReader


def patterned(count: int, size: int = 8, channels: int = 3) -> np.ndarray:
    """Images (N, S, S, ch) that all differ: the first pixel holds the number of the image."""
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count) % 256
    return images


def write_npz(path: Path, per_class: Sequence[int] = (10, 10, 10), **arrays: np.ndarray) -> Path:
    labels = np.repeat(np.arange(len(per_class)), per_class)
    content = {"images": patterned(len(labels)), "label": labels, **arrays}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return path


def write_folder(root: Path, classes: Mapping[str, int], size: tuple[int, int] = (12, 9), ending: str = "png") -> Path:
    rng = np.random.default_rng(1)
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.{ending}")
    return root


def labelled(labels: Sequence[int] | np.ndarray, **columns: np.ndarray) -> ImageSet:
    """A set with these labels and tiny images."""
    count = len(labels)
    pixels = np.zeros((count, 1, 2, 2), np.uint8)
    return ImageSet(np.asarray(labels, np.int64), ArrayReader(pixels), np.arange(count), 1, 2, columns)


def png16(path: Path, pixels: np.ndarray) -> Path:
    """Write ``(H, W)`` or ``(H, W, 1 to 4)`` uint16 as a PNG of 16 bits."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, bands = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def tiff(
    path: Path,
    pixels: np.ndarray,
    *,
    white_is_zero: bool = False,
    planes: bool = False,
    deflate: bool = False,
    bits: int | None = None,
    content: bytes | None = None,
    orientation: int = 1,
) -> Path:
    """Write ``(H, W)`` or ``(H, W, 3)`` of any number type as a TIFF of little-endian bytes.

    `bits` and `content` replace the bits of a value and the stored bytes, for packed values.
    """
    little = pixels.astype(pixels.dtype.newbyteorder("<"))
    bands = 1 if pixels.ndim == 2 else pixels.shape[2]
    parts = [little[..., band].tobytes() for band in range(bands)] if planes else [content or little.tobytes()]
    parts = [zlib.compress(part) for part in parts] if deflate else parts
    bits = bits or 8 * pixels.dtype.itemsize
    data, offsets = b"", []
    for part in parts:
        offsets.append(8 + len(data))
        data += part + b"\0" * (len(part) % 2)
    tags = [
        (256, 4, [pixels.shape[1]]),
        (257, 4, [pixels.shape[0]]),
        (258, 3, [bits] * bands),
        (259, 3, [8 if deflate else 1]),
        (262, 3, [2 if bands == 3 else 0 if white_is_zero else 1]),
        (273, 4, offsets),
        (274, 3, [orientation]),
        (277, 3, [bands]),
        (278, 4, [pixels.shape[0]]),
        (279, 4, [len(part) for part in parts]),
        (284, 3, [2 if planes else 1]),
        (339, 3, [{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * bands),
    ]
    start = 8 + len(data)
    directory, tail = struct.pack("<H", len(tags)), b""
    after = start + 2 + 12 * len(tags) + 4
    for tag, kind, values in tags:
        packed = b"".join(struct.pack("<H" if kind == 3 else "<I", value) for value in values)
        if len(packed) > 4:
            field, tail = struct.pack("<I", after + len(tail)), tail + packed + b"\0" * (len(packed) % 2)
        else:
            field = packed.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, len(values)) + field
    path.write_bytes(b"II*\0" + struct.pack("<I", start) + data + directory + b"\0\0\0\0" + tail)
    return path
