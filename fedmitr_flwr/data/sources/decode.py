"""Decode an image from a file or a table to square uint8 pixels."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fedmitr_flwr.data.sources.depth import Peaks, White, depth_of, eight_bits, highest, peaks_of
from fedmitr_flwr.data.sources.names import shown
from fedmitr_flwr.data.sources.raw import Origin

# Exceptions of PIL for damaged content: OSError (truncated, unknown format), SyntaxError and ValueError (broken PNG
# chunks, impossible sizes), DecompressionBombError (a header with a wrong size), and others from plugins that do not
# check what they read.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    TypeError,
    struct.error,
    zlib.error,
)

# Formats that PIL names and does not decode, that other programs decode (EPS), or whose scale of values PIL ignores.
_NOT_READ = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "MCIDAS", "MPEG", "SPIDER", "WMF")
_SEVERAL = ("AVIF", "FLI", "GIF", "PNG", "TIFF", "WEBP")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Open an image file of any format that PIL decodes by itself; the pixels are decoded later.

    Raises
    ------
    OSError
        If the file cannot be read or is not such an image.
    """
    Image.init()
    return Image.open(file, formats=[name for name in Image.ID if name not in _NOT_READ])


def has_image_ending(path: Path) -> bool:
    """Return whether the ending of a file name belongs to a format that `open_image` reads."""
    name = Image.registered_extensions().get(path.suffix.lower())
    return name in Image.OPEN and name not in _NOT_READ


def has_several(image: Image.Image) -> bool:
    """Return whether a file has several pictures, such as an animation; only the first one is read."""
    return image.format in _SEVERAL and bool(getattr(image, "is_animated", False))


def is_image(path: Path) -> bool:
    """Return whether the content of a file is that of an image, whatever its ending.

    Formats without a signature are not tried, because any file may look like one of them.
    """
    Image.init()
    try:
        with Image.open(path, formats=[n for n in Image.ID if n not in _NOT_READ and Image.OPEN[n][1] is not None]):
            return True
    except PermissionError:
        raise
    except DECODE_ERRORS:
        return False


def fit_image(image: Image.Image, channels: int, size: int, white: White | None = None) -> NDArray[np.uint8]:
    """Turn an image upright, crop it to its central square, convert its channels and resize it (bilinear, antialiased).

    Transparent parts become white. More than 8 bits are scaled to 8 by the rule of `depth`.

    Parameters
    ----------
    image
        An opened image. If it comes from a file, it must not be loaded yet: PIL then no longer knows how many bits its
        colours had.
    channels
        1 (grey) or 3 (colour).
    size
        Side of the result in pixels.
    white
        Values of white of the source, for images of more than 8 bits. None: the image is refused if it alone does not
        tell its value of white.

    Returns
    -------
    ndarray
        ``(channels, size, size)`` uint8.

    Raises
    ------
    ValueError
        If the channels or the pixels cannot be converted. A damaged image raises other exceptions of `DECODE_ERRORS`.
    """
    if channels not in (1, 3):
        raise ValueError(f"encoded images can be read with 1 or 3 channels, not {channels}")
    depth = depth_of(image)
    # PIL can decode a JPEG at 1/2, 1/4 or 1/8 of its size; at least twice the target size avoids aliasing.
    image.draft(None, (2 * size, 2 * size))
    image = eight_bits(_upright(image), depth, white)
    image = _opaque(image).convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def _upright(image: Image.Image) -> Image.Image:
    """Load an image and turn it as its EXIF data says."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data of an image that was decoded: it is shown as it is stored
        return image
    return image if turn is None else image.transpose(turn)


def _opaque(image: Image.Image) -> Image.Image:
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
    white
        Values of white of the source. None: each image is decided alone.
    """

    paths: tuple[Path, ...]
    origin: Origin
    white: White | None = None

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
                with open_image(path) as image:
                    out[slot] = fit_image(image, channels, size, self.white)
            except DECODE_ERRORS as error:
                raise self.origin.error(f"cannot read the image {shown(path)}: {reason(error)}") from None

        workers = min(torch.get_num_threads(), len(rows))
        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(decode, range(len(rows))))
        else:
            for slot in range(len(rows)):
                decode(slot)
        return torch.from_numpy(out)


@dataclass(frozen=True)
class Inspection:
    """What decoding all files of a source has found.

    Attributes
    ----------
    damaged
        Files that cannot be decoded, each with the reason.
    peaks
        Largest values of the images of more than 8 bits.
    several
        Number of files with more than one picture, such as animations; only their first picture is read.
    """

    damaged: tuple[tuple[Path, str], ...]
    peaks: Peaks
    several: int


def inspect_files(paths: Sequence[Path]) -> Inspection:
    """Decode each file to its end, a JPEG at 1/8 of its size, which takes about a millisecond.

    PIL's `verify` reads only the header of a JPEG, so it does not detect truncated files.
    """

    def inspect(path: Path) -> tuple[str, Peaks, bool]:
        try:
            with open_image(path) as image:
                depth = depth_of(image)
                several = has_several(image)
                image.draft(None, (1, 1))
                image.load()
                return "", peaks_of(image, depth), several
        except DECODE_ERRORS as error:
            return reason(error), Peaks(), False

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(inspect, paths))
    return Inspection(
        tuple((path, text) for path, (text, _, _) in zip(paths, found, strict=True) if text),
        highest(peaks for _, peaks, _ in found),
        sum(several for _, _, several in found),
    )


def reason(error: BaseException) -> str:
    """Return why an image cannot be decoded, without the path, which the message has already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "it is damaged, or has a format or a kind of pixels that Pillow does not read"
    return shown(str(error)) or type(error).__name__
