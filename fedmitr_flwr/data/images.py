"""Sets of labelled images whose pixels stay in memory, in files or in an Arrow table until they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Labels = NDArray[np.int64]
Column = NDArray[np.generic]
Index = Tensor | NDArray[np.integer] | Sequence[int]


class Reader(Protocol):
    """Reads the pixels of a source; rows are numbered from 0 over all its splits."""

    def read(self, rows: NDArray[np.int64], channels: int, size: int) -> Tensor:
        """Return the images of these rows, ``(B, channels, size, size)`` uint8, resized if needed."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """Images with labels. The set holds no pixels, so subsets are cheap and large sources stay on disk.

    Attributes
    ----------
    labels
        ``(N,)`` int64, positions in the spec's class names.
    columns
        Further columns, each ``(N,)``, by which `partition.kind = natural` can divide.
    reader, rows
        Reader of the source's pixels, and the rows of this set in it, ``(N,)`` int64.
    channels, image_size
        Number of channels and side in pixels of the images that `images` returns.
    """

    labels: Labels = field(repr=False)
    reader: Reader = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    channels: int
    image_size: int
    columns: Mapping[str, Column] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        lengths = {"rows": len(self.rows), **{name: len(column) for name, column in self.columns.items()}}
        wrong = {name: length for name, length in lengths.items() if length != len(self.labels)}
        if wrong:
            raise ValueError(f"all columns must have the length of labels, {len(self.labels)}; other lengths: {wrong}")

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, index: Index) -> Tensor:
        """Read some images; images in files are decoded in this call.

        Parameters
        ----------
        index
            ``(B,)`` positions in this set, in any order; repeats are allowed.

        Returns
        -------
        Tensor
            ``(B, channels, image_size, image_size)`` uint8.

        Raises
        ------
        IndexError
            If a position is outside the set.
        SettingsError
            If an image can no longer be decoded; the message names the file.
        """
        return self.reader.read(self.rows[_positions(index, len(self))], self.channels, self.image_size)

    def subset(self, index: Index) -> ImageSet:
        """Return the images at ``(M,)`` positions as a new set that shares the pixels."""
        chosen = _positions(index, len(self))
        return ImageSet(
            labels=self.labels[chosen],
            reader=self.reader,
            rows=self.rows[chosen],
            channels=self.channels,
            image_size=self.image_size,
            columns={name: column[chosen] for name, column in self.columns.items()},
        )

    def histogram(self, num_classes: int) -> Labels:
        """Count the images of each class, ``(C,)`` int64."""
        return np.bincount(self.labels, minlength=num_classes).astype(np.int64)


@dataclass(frozen=True)
class ArrayReader:
    """Images in memory, ``(N, ch, H, W)`` uint8."""

    pixels: NDArray[np.uint8] = field(repr=False)

    def read(self, rows: NDArray[np.int64], channels: int, size: int) -> Tensor:
        """Return rows, converted between grey and colour and resized (bilinear, antialiased) if needed."""
        images = convert_channels(torch.from_numpy(np.ascontiguousarray(self.pixels[rows])), channels)
        if images.shape[-2:] == (size, size):
            return images
        if len(images) == 0:
            return images.new_zeros((0, channels, size, size))
        wide = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        return wide.round().clamp(0, 255).to(torch.uint8)


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Convert grey to colour by repetition, or colour to grey by its luma (ITU-R BT.601).

    Raises
    ------
    ValueError
        For any other pair of channel numbers.
    """
    have = images.shape[1]
    if have == channels:
        return images
    if have == 1:
        return images.repeat(1, channels, 1, 1)
    if have == 3 and channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        return (images.float() * weights).sum(1, keepdim=True).round().clamp(0, 255).to(torch.uint8)
    raise ValueError(f"images of {have} channels cannot be converted to {channels} channels")


def _positions(index: Index, length: int) -> NDArray[np.int64]:
    chosen: NDArray[np.int64]
    if isinstance(index, Tensor):
        chosen = index.detach().cpu().numpy().astype(np.int64, casting="safe")
    else:
        plain = np.asarray(index)
        # NumPy reads an empty list as float64, and would convert a mask to the rows 0 and 1 without an error.
        chosen = plain.astype(np.int64, casting="safe") if plain.size and plain.dtype != bool else _empty(plain)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= length):
        raise IndexError(f"positions {chosen.min()} to {chosen.max()} are outside a set of {length} images")
    return chosen


def _empty(plain: NDArray[np.generic]) -> NDArray[np.int64]:
    if plain.size:
        raise TypeError("positions must be integers; convert a mask with numpy.flatnonzero")
    return np.zeros(0, np.int64)
