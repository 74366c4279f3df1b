"""Pixels of more than 8 bits: which value is white, and how they become pixels of 8 bits.

A file says how many bits a value has, but not how many of them are used: an image of 12 bits is often stored in 16.
Stretching each image to its own maximum would change the brightness between images. So the value of white is decided
once for all images of a source, from the largest value of all of them, and the source is refused where this value
does not tell. The rule is

=====================  ===================================  =====  ==================================================
pixels                 the largest value of the source      white  else
=====================  ===================================  =====  ==================================================
8 bits or fewer        any                                  255
integers, 16 or 32     above 32767, at most 65535           65535  refused
12 bits (packed TIFF)  any                                  4095
floating point         above 0.5, at most 1                 1      refused
floating point         above 127.5, at most 255             255    refused
floating point         above 32767, at most 65535           65535  refused
=====================  ===================================  =====  ==================================================

Negative values and values that are not finite are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from PIL import Image

_HIGHEST_BIT = 32767
_WHOLE = 65535
_FLOAT_WHITES = ((0.5, 1.0), (127.5, 255.0), (float(_HIGHEST_BIT), float(_WHOLE)))
_GREY = ("1", "L", "P", "LA", "La", "PA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_COLOUR = ("RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_REMEDY = "convert the images to 8 bits, all with the same factor"

# Tags of TIFF files.
_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339
_WHITE_IS_ZERO, _SEPARATE_PLANES, _SIGNED = 0, 2, 2


class Depth(Enum):
    """How the pixels of a file are stored.

    Of colours of 16 bits, PIL keeps the higher 8 bits only.
    """

    EIGHT = 8
    TWELVE = 12
    INTEGER = 16
    COLOUR = 48
    FLOAT = 32


@dataclass(frozen=True)
class Peaks:
    """Largest values of some images: of integers of more than 8 bits, and of floating point. None: there are none."""

    integer: int | None = None
    real: float | None = None


@dataclass(frozen=True)
class White:
    """Values of white of a source: of integers of more than 8 bits, and of floating point. None: not decided."""

    integer: float | None = None
    real: float | None = None


def depth_of(image: Image.Image) -> Depth:
    """Return how an image is stored; it must have been opened from a file and not loaded yet.

    Raises
    ------
    ValueError
        If PIL would read these pixels as something else, or cannot convert them.
    """
    if image.mode not in _GREY + _COLOUR:
        raise ValueError(f"pixels of the kind {image.mode} are not supported (RGB of 8 bits is)")
    tags: Any = getattr(image, "tag_v2", {})
    bits = max(_tuple(tags.get(_BITS, 1)))
    deep = image.mode == "F" or image.mode.startswith("I")
    if _SIGNED in _tuple(tags.get(_SAMPLE_FORMAT, 1)) and not deep:
        raise ValueError("pixels with a sign are not supported")
    if bits > 8 and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ValueError(f"a TIFF of {bits} bits in which 0 is white is not supported")
    if bits > 8 and tags.get(_PLANES) == _SEPARATE_PLANES:
        raise ValueError(f"a TIFF of {bits} bits with separate planes is not supported")
    if image.mode == "F":
        return Depth.FLOAT
    if deep:
        return Depth.TWELVE if bits == 12 else Depth.INTEGER
    return Depth.COLOUR if bits > 8 or any(map(_halved, getattr(image, "tile", ()))) else Depth.EIGHT


def peaks_of(image: Image.Image, depth: Depth) -> Peaks:
    """Return the largest value of one image.

    Raises
    ------
    ValueError
        If a value is negative, not finite or above the largest white.
    """
    if depth in (Depth.EIGHT, Depth.TWELVE):
        return Peaks()
    if depth is Depth.COLOUR:
        ranges = zip(image.getbands(), np.reshape(image.getextrema(), (-1, 2)).tolist(), strict=True)
        return Peaks(integer=max(256 * int(high) + 255 for band, (_, high) in ranges if band not in "Aa"))
    pixels = np.asarray(image)
    low, high = (float(pixels.min()), float(pixels.max()))
    if not np.isfinite([low, high]).all():
        raise ValueError("it has values that are not finite")
    if low < 0 or high > _WHOLE:
        value = low if low < 0 else high
        raise ValueError(f"it has the value {value:g}; values must be from 0 to {_WHOLE}")
    return Peaks(real=high) if depth is Depth.FLOAT else Peaks(integer=int(high))


def highest(peaks: Iterable[Peaks]) -> Peaks:
    """Return the largest values of all images of a source."""
    found = list(peaks)
    return Peaks(
        max((peak.integer for peak in found if peak.integer is not None), default=None),
        max((peak.real for peak in found if peak.real is not None), default=None),
    )


def white_of(peaks: Peaks) -> White:
    """Decide the value of white from the largest values of all images of a source.

    Raises
    ------
    ValueError
        If these values do not tell it.
    """
    if peaks.integer is not None and peaks.integer <= _HIGHEST_BIT:
        raise ValueError(
            f"the images of 16 or more bits have no value above {peaks.integer}, so the value of white is not known: "
            f"white is {_WHOLE} if at least one image has a value above {_HIGHEST_BIT}; else {_REMEDY}"
        )
    real = None
    if peaks.real is not None:
        real = next((white for least, white in _FLOAT_WHITES if least < peaks.real <= white), None)
        if real is None:
            allowed = ", ".join(f"{white:g} if it is above {least:g}" for least, white in _FLOAT_WHITES)
            raise ValueError(
                f"the largest value of the floating-point images is {peaks.real:g}, so the value of white is not "
                f"known: white is the smallest of 1, 255 and 65535 that is not below the largest value ({allowed}); "
                f"else {_REMEDY}"
            )
    return White(None if peaks.integer is None else _WHOLE, real)


def eight_bits(image: Image.Image, depth: Depth, white: White | None = None) -> Image.Image:
    """Return an image with values from 0 to 255, of a mode that PIL converts to grey and colour.

    A transparent value of grey becomes white.

    Parameters
    ----------
    image
        A loaded image.
    depth
        From `depth_of`.
    white
        Values of white of the source. A value that is missing is decided from this image alone.

    Raises
    ------
    ValueError
        As for `peaks_of` and `white_of`.
    """
    if depth is Depth.EIGHT:
        return image
    if depth is Depth.TWELVE:
        return Image.fromarray((np.asarray(image) >> 4).clip(0, 255).astype(np.uint8))
    known = white and (white.real if depth is Depth.FLOAT else white.integer)
    if not known:
        white = white_of(peaks_of(image, depth))
    clear = image.info.get("transparency")
    if depth is Depth.COLOUR or not white:
        if isinstance(clear, tuple):  # it has 16 bits as in the file; the pixels have the higher 8
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        return image
    if depth is Depth.INTEGER:
        values = np.asarray(image).astype(np.int64)
        grey = (values >> 8).clip(0, 255).astype(np.uint8)
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey)
    if white.real == 255:
        return image
    pixels = np.asarray(image, np.float64) * (255 / (white.real or 1))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _tuple(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) and value else (int(value),) if isinstance(value, int) else (1,)


def _halved(tile: Any) -> bool:
    """Return whether PIL reads the values of a tile with 16 bits and keeps 8."""
    codec, arguments = tile[0], tile[3]
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    rawmode = str(arguments[0]) if arguments else ""
    if codec in ("ppm", "ppm_plain"):
        return int(arguments[-1]) > 255
    if codec == "sgi_rle":
        return bool(arguments[-1] == 2)
    return codec == "SGI16" or rawmode.endswith((";16B", ";16L", ";16N"))
