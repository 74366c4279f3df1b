"""Decode an image from a file or a table to square uint8 pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedmitr_flwr.data.sources.raw import Origin

# Exceptions of PIL for damaged content: OSError (truncated, unknown format), SyntaxError and ValueError (broken PNG
# chunks, impossible sizes), DecompressionBombError (a header with a wrong size).
DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def fit_image(image: Image.Image, channels: int, size: int) -> NDArray[np.uint8]:
    """Crop an image to its central square, convert its channels and resize it (bilinear, antialiased).

    Transparent parts become white, and 16-bit grey is scaled to 8 bits.

    Returns
    -------
    ndarray
        ``(channels, size, size)`` uint8.
    """
    if channels not in (1, 3):
        raise ValueError(f"encoded images can be read with 1 or 3 channels, not {channels}")
    # PIL can decode a JPEG at 1/2, 1/4 or 1/8 of its size; at least twice the target size avoids aliasing.
    image.draft(None, (2 * size, 2 * size))
    image = _opaque(image).convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image)
    return image


@dataclass(frozen=True)
class FileReader:
    """Reads image files and decodes them in every read.

    Attributes
    ----------
    paths
        File of each row.
    origin
        The setting that named the source, for error messages.
    """

    paths: tuple[Path, ...]
    origin: Origin

    def read(self, rows: NDArray[np.int64], channels: int, size: int) -> Tensor:
        """Decode the images of these rows with as many threads as torch uses.

        Raises
        ------
        SettingsError
            If a file cannot be decoded; the message names it.
        """
        out = np.empty((len(rows), channels, size, size), np.uint8)

        def decode(slot: int) -> None:
            path = self.paths[rows[slot]]
            try:
                with Image.open(path) as image:
                    out[slot] = fit_image(image, channels, size)
            except DECODE_ERRORS as error:
                raise self.origin.error(f"cannot read the image {path}: {error}") from None

        workers = min(torch.get_num_threads(), len(rows))
        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(decode, range(len(rows))))
        else:
            for slot in range(len(rows)):
                decode(slot)
        return torch.from_numpy(out)


def damaged_files(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return the files that cannot be decoded, each with the reason.

    PIL's `verify` reads only the header of a JPEG, so it does not detect truncated files. This function decodes each
    file to its end, a JPEG at 1/8 of its size, which takes about a millisecond.
    """

    def problem(path: Path) -> str:
        try:
            with Image.open(path) as image:
                image.draft(None, (1, 1))
                image.load()
        except DECODE_ERRORS as error:
            return str(error) or type(error).__name__
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [(path, text) for path, text in zip(paths, pool.map(problem, paths), strict=True) if text]
