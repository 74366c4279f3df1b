"""Pictures as data URIs, small enough to fit many of them on one page."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_LARGEST = 96  # pixels a side; larger images are reduced to this size and stored as JPEG


def picture(pixels: Tensor) -> str:
    """Encode one image as a data URI.

    Parameters
    ----------
    pixels
        ``(ch, S, S)`` uint8. Of three channels or more the first three are red, green and blue. Of fewer the first is
        grey.

    Returns
    -------
    str
        A PNG if S is at most 96, else a JPEG of 96 x 96 pixels.
    """
    array = pixels[:3].permute(1, 2, 0).numpy() if len(pixels) >= 3 else pixels[0].numpy()
    image = Image.fromarray(np.ascontiguousarray(array))
    if image.width <= _LARGEST:
        return _uri(image, "png")
    return _uri(image.resize((_LARGEST, _LARGEST), Image.Resampling.LANCZOS), "jpeg")


def stopped_overlay(kept: Tensor, grid: tuple[int, int]) -> str:
    """Draw stopped patches in translucent blue, one pixel a patch; `kept` is ``(P,)`` bool."""
    return _overlay(torch.tensor([64, 110, 220]), 150 * (~kept).float(), grid)


def density_overlay(density: Tensor, grid: tuple[int, int]) -> str:
    """Draw the density of each patch relative to the largest in orange, one pixel a patch; `density` is ``(P,)``."""
    share = density.clamp_min(0) / density.max().clamp_min(1e-12)
    return _overlay(torch.tensor([255, 140, 0]), 215 * share, grid)


def matrix(values: Tensor) -> str:
    """Draw ``(R, C)`` values as a blue heat map, one pixel a cell; 0 is transparent and 1 opaque."""
    return _overlay(torch.tensor([57, 106, 201]), 255 * values.flatten(), (values.shape[0], values.shape[1]))


def _overlay(colour: Tensor, alpha: Tensor, grid: tuple[int, int]) -> str:
    rgba = torch.empty(grid[0] * grid[1], 4, dtype=torch.uint8)
    rgba[:, :3] = colour.to(torch.uint8)
    rgba[:, 3] = alpha.round().clamp(0, 255).to(torch.uint8)
    return _uri(Image.fromarray(rgba.reshape(*grid, 4).numpy()), "png")


def _uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), optimize=True, **({"quality": 82} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
