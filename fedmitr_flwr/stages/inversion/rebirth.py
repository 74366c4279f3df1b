"""Patch Rebirth Inversion (Heo and Choi 2025, arXiv 2509.23235): one run yields several sparse images.

Where sparse inversion stops the patches with the least attention, here those with the most leave, as a finished sparse
image, and the others go on: with the first gone, the ensemble has to be convinced by what is left, and patches that
meant nothing come to mean something. A run with n stops yields n + 1 images that share no patch.

Readings of ours: the published fractions are not available to us, so each image gets equally many patches,
``floor(P / (n + 1))``, `inversion.fractions` is without effect, and what is left over leaves at the last stop. The
patches that an image does not have show the run's starting noise.

Letters: B runs, P patches of the full grid, L patches of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmitr_flwr.ensemble.loss_terms import Term
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import InversionSettings, SettingsError
from fedmitr_flwr.stages.inversion.batch import NOBODY, InversionBatch, InversionTask, Watch, optimise, starting_images
from fedmitr_flwr.stages.synthetic import SyntheticImages


def invert_by_rebirth(
    task: InversionTask,
    labels: Tensor,
    *,
    generator: torch.Generator,
    watch: Watch = NOBODY,
    terms: Sequence[Term] = (),
) -> SyntheticImages:
    """Invert the ensemble into n + 1 images for each label; parameters as `sparse.invert`.

    Returns
    -------
    SyntheticImages
        ``B (n + 1)``: first the B that left at the first stop, at last the B that stayed to the end. `loss` is that of
        the patches that were still there when the image left, itself among them.

    Raises
    ------
    SettingsError
        If there are fewer patches than images.
    InversionDivergedError
        As `sparse.invert`.
    """
    grid, settings = task.grid, task.settings
    size, last = _patches_each(grid.num_patches, settings), len(settings.stops) - 1
    if size == 0:
        allowed = f"must be fewer than the {grid.num_patches} patches of an image"
        raise SettingsError(("inversion.stops", settings.stops, allowed))
    start = starting_images(len(labels), grid, settings, generator).to(labels.device)
    batch = InversionBatch(task, labels, start, terms=terms)
    noise = batch.result().images
    groups: list[Tensor] = []
    losses: list[Tensor] = []

    def leave(attention: Tensor) -> Tensor:
        """Note the most attended patches, and return the places of those that go on."""
        order = attention.sort(dim=1, descending=True, stable=True).indices
        end = 2 * size if len(groups) == last else order.shape[1]
        groups.append(batch.kept.gather(1, order[:, :size]).sort(1).values)
        return order[:, size:end].sort(1).values

    def note(iteration: int, loss: Tensor) -> None:
        if iteration in settings.stops:
            losses.append(loss)
        if watch.on_iteration is not None:
            watch.on_iteration(iteration, loss)

    noting = replace(watch, on_iteration=note)
    optimise(batch, dict.fromkeys(settings.stops, leave), generator, noting)
    done = batch.result()
    parts = [
        SyntheticImages(_only(done.images, noise, kept, grid), labels, kept, loss)
        for kept, loss in zip([*groups, done.kept], [*losses, done.loss], strict=True)
    ]
    return SyntheticImages.join(parts)


def _only(images: Tensor, others: Tensor, kept: Tensor, grid: PatchGrid) -> Tensor:
    """`images` where `kept` says, ``(B, L)``, and `others` elsewhere; ``(B, ch, S, S)``."""
    mask = torch.zeros(len(kept), grid.num_patches, 1, dtype=torch.bool, device=kept.device)
    mask = mask.scatter(1, kept[..., None], True)
    return grid.to_images(torch.where(mask, grid.to_patches(images), grid.to_patches(others)))


def images_per_run(settings: InversionSettings) -> int:
    """Return how many images one run yields: one for each stop, and the last one."""
    return len(settings.stops) + 1


def kept_after_stops(patches: int, settings: InversionSettings) -> list[int]:
    """Return how many of P patches are in the graph after each stop; after the last stop, those of the last image."""
    size = _patches_each(patches, settings)
    return [patches - number * size for number in range(1, len(settings.stops))] + [size]


def _patches_each(patches: int, settings: InversionSettings) -> int:
    return patches // images_per_run(settings)
