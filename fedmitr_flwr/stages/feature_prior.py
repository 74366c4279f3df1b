"""Measure the features of the common initialisation on random images, for `train.head-start = discriminant`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.feature_prior import FeaturePrior
from fedmitr_flwr.models.moments import check_one_head
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import forward_patches, head_input
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.stages.random_images.families import FAMILIES

IMAGES = 768
"""Number of random images of each family: together about six times the embedding width of a ViT-S."""


@torch.no_grad()
def feature_prior(
    settings: Settings,
    spec: ImageSpec,
    initial: Mapping[str, Tensor],
    device: torch.device,
    images: int = IMAGES,
    batch_size: int = 128,
) -> FeaturePrior:
    """Compute mean and covariance of the head's input on random images of every family.

    Parameters
    ----------
    settings
        `model` and `run.seed` are used.
    spec
        Geometry and normalisation of the images.
    initial
        State dict of the common initialisation.
    device
        Device of the forward passes.
    images
        Number of random images of each family.
    batch_size
        Number of images that are drawn and run together.

    Raises
    ------
    SettingsError
        If the model has two heads.
    """
    model = build_model(settings.model, spec)
    check_one_head(model, settings.model.name)
    model.load_state_dict(dict(initial))
    model.to(device).eval()
    grid = PatchGrid.of(model, spec)
    generator = torch.Generator().manual_seed(settings.run.seed)
    families = []
    for draw in FAMILIES.values():
        parts = []
        for first in range(0, images, batch_size):  # drawn in parts, because images of 224 pixels take much memory
            patches = grid.to_patches(draw(min(batch_size, images - first), grid, generator)).to(device)
            parts.append(head_input(model, forward_patches(model, patches, None).features).float().cpu())
        families.append(torch.cat(parts))
    return FeaturePrior.of_features(families)
