"""Small image sources for the tests of data: files made in a temporary folder, and a set of labels only."""

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
