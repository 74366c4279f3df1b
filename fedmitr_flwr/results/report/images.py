"""Pictures as data URIs, small enough for one page."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_LARGEST = 96  # pixels; larger images are shown smaller, as JPEG


def picture(pixels: Tensor) -> str:
    """Encode one image.

    Parameters
    ----------
    pixels
        ``(ch, S, S)`` uint8; the first channel as grey unless there are three.

    Returns
    -------
    str
        A data URI: PNG, or JPEG for images of more than 96 pixels, shown smaller.
    """
    array = pixels[:3].permute(1, 2, 0).numpy() if len(pixels) >= 3 else pixels[0].numpy()
    image = Image.fromarray(np.ascontiguousarray(array))
    if image.width <= _LARGEST:
        return _uri(image, "png")
    return _uri(image.resize((_LARGEST, _LARGEST), Image.Resampling.LANCZOS), "jpeg")


def stopped_overlay(kept: Tensor, grid: tuple[int, int]) -> str:
    """Blue veil over the patches that were stopped, one pixel a patch; `kept` is ``(P,)`` bool."""
    return _overlay(torch.tensor([64, 110, 220]), 150 * (~kept).float(), grid)


def density_overlay(density: Tensor, grid: tuple[int, int]) -> str:
    """Orange where a patch is dense, relative to the densest of the image; `density` is ``(P,)``."""
    share = density.clamp_min(0) / density.max().clamp_min(1e-12)
    return _overlay(torch.tensor([255, 140, 0]), 215 * share, grid)


def matrix(values: Tensor) -> str:
    """Blue heat map of ``(R, C)`` values in 0..1, one pixel a cell, transparent at 0."""
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
