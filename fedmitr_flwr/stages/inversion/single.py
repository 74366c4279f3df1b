"""Invert a single timm ViT by sparse model inversion (SMI, arXiv 2510.27186), without federated learning.

Letters: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.vit import check_supported
from fedmitr_flwr.settings import InversionSettings, SettingsError
from fedmitr_flwr.stages.inversion.batch import InversionTask, Watch
from fedmitr_flwr.stages.inversion.methods import images_per_run, invert_batch
from fedmitr_flwr.stages.synthetic import SyntheticImages


def spec_of(model: VisionTransformer) -> ImageSpec:
    """Read classes, image size and normalisation from the ``pretrained_cfg`` of a timm model.

    The size and channels of the model's patch embedding take precedence. Missing class names become the class numbers.
    A mean or standard deviation that is missing or does not fit the channels becomes 0.5.
    """
    source = cast(dict[str, Any], model.pretrained_cfg or {})
    channels, size, _ = source.get("input_size", (3, 224, 224))
    named = source.get("label_names") or [str(number) for number in range(model.num_classes)]
    real = cast(Any, model.patch_embed)
    size = real.img_size[0] if getattr(real, "img_size", None) else size
    channels = real.proj.in_channels
    mean = tuple(source.get("mean", ())) if len(source.get("mean", ())) == channels else (0.5,) * channels
    std = tuple(source.get("std", ())) if len(source.get("std", ())) == channels else (0.5,) * channels
    return ImageSpec(tuple(named), channels, size, mean, std)


def invert_model(
    model: VisionTransformer,
    labels: Sequence[int],
    settings: InversionSettings,
    *,
    spec: ImageSpec | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_iteration: Callable[[int, Tensor], None] | None = None,
) -> SyntheticImages:
    """Invert one classifier into images of the given classes.

    Parameters
    ----------
    model
        A timm ViT with a [CLS] token. It is put into eval mode, frozen and moved to `device`.
    labels
        Target class of each image.
    settings
        Iterations, stop schedule, optimiser and priors; `InversionSettings.batch_size` images are inverted together.
    spec
        Geometry and normalisation; None: read from the model.
    seed
        Seed of starting noise and jitter. An image depends on the number of its batch, not on how many batches follow.
    device
        Device on which inversion runs.
    on_iteration
        As `batch.Watch.on_iteration`, but iterations are counted over all batches.

    Returns
    -------
    SyntheticImages
        On `device`. ``images`` are normalised; `ImageSpec.denormalise` turns them into pixels.

    Raises
    ------
    SettingsError
        If the model cannot run on a subset of its patches, `inversion.method` makes several images for each label, or
        a label is out of range.
    InversionDivergedError
        If a loss or a pixel is not finite.
    """
    check_supported(model)
    if images_per_run(settings) != 1:
        allowed = 'must be a method that makes one image for each label, such as "sparse"'
        raise SettingsError(("inversion.method", settings.method, allowed))
    C = model.num_classes
    wrong = [label for label in labels if not 0 <= label < C]
    if wrong or not labels:
        raise SettingsError(("labels", wrong[0] if wrong else "", f"must be classes of the model, 0 to {C - 1}"))
    spec = spec or spec_of(model)
    ensemble = Ensemble([model.to(device)], torch.ones(1, C, device=device))
    task = InversionTask(ensemble, PatchGrid.of(model, spec), settings)
    parts = []
    wanted = torch.tensor(list(labels), device=device)
    for number, batch in enumerate(wanted.split(settings.batch_size)):
        before = number * settings.iterations

        def count(iteration: int, loss: Tensor, before: int = before) -> None:
            if on_iteration is not None:
                on_iteration(before + iteration, loss)

        parts.append(invert_batch(task, batch, number=number, seed=seed, watch=Watch(count)))
    return SyntheticImages.join(parts)
