"""Draw the figures of a run."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.stages.synthetic import SyntheticImages


def save_synthetic(synthetic: SyntheticImages, spec: ImageSpec, grid: PatchGrid, path: Path, columns: int = 12) -> None:
    """Draw synthetic images into a PNG file, one row for each class; stopped patches are tinted blue.

    Parameters
    ----------
    synthetic
        Images of stage 1.
    spec
        Class names and normalisation.
    grid
        Geometry of the patches.
    path
        PNG file to write.
    columns
        Maximum number of images of a class.
    """
    labels = synthetic.labels.cpu()
    classes = labels.unique().tolist()
    rows = [(labels == label).nonzero().squeeze(1)[:columns] for label in classes]
    width = max(len(row) for row in rows)
    pixels = shown(synthetic, spec, grid)
    figure = Figure(figsize=(0.75 * width + 1.2, 0.75 * len(rows)), dpi=110)
    axes = np.atleast_2d(figure.subplots(len(rows), width, squeeze=False))
    for label, row, line in zip(classes, rows, axes, strict=True):
        for place, axis in enumerate(line):
            axis.set_axis_off()
            if place < len(row):
                axis.imshow(pixels[row[place]].permute(1, 2, 0).numpy(), interpolation="nearest")
        line[0].text(-0.15, 0.5, spec.class_names[label], transform=line[0].transAxes, ha="right", va="center")
    share = synthetic.kept.shape[1] / grid.num_patches
    title = f"Synthetic images by class; {share:.0%} of the patches optimised to the end, stopped patches tinted blue"
    figure.suptitle(title, y=0.93, fontsize="medium")
    figure.savefig(path, bbox_inches="tight")
    plt.close("all")


def shown(synthetic: SyntheticImages, spec: ImageSpec, grid: PatchGrid) -> Tensor:
    """Return ``(B, 3, S, S)`` pixels in 0..1 in which stopped patches are blended with 35 % blue."""
    images = synthetic.images.cpu()
    grey = spec.denormalise(images).float() / 255
    colour = grey.expand(-1, 3, -1, -1) if spec.channels == 1 else grey[:, :3]
    stopped = torch.ones(len(images), grid.num_patches, 1).scatter(1, synthetic.kept.cpu()[..., None], 0.0)
    full = PatchGrid(1, grid.image_size, grid.patch, grid.low, grid.high)
    mask = full.to_images(stopped.expand(-1, -1, grid.patch[0] * grid.patch[1]))
    tint = torch.tensor([0.25, 0.45, 0.85])[:, None, None]
    return colour * (1 - 0.35 * mask) + 0.35 * mask * tint
