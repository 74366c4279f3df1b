"""Patch Rebirth Inversion (Heo and Choi 2025, arXiv 2509.23235): one run yields several sparse images.

At each stop the patches with the most attention are taken out as a finished sparse image, and inversion continues with
the others. (Sparse inversion drops the patches with the least attention.) Without the most attended patches, the loss
can only fall through the remaining ones, so patches without content acquire some. A run with n stops yields n + 1
images that share no patch.

Departures: the published fractions are not available to us, so every image gets ``floor(P / (n + 1))`` patches, and
`inversion.fractions` has no effect. Surplus patches are dropped at the last stop. Patches that do not belong to an
image show the starting noise of the run.

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
    """Invert the ensemble into n + 1 images for each label; the parameters are those of `sparse.invert`.

    Returns
    -------
    SyntheticImages
        ``B (n + 1)`` images: first the B that are finished at the first stop, last the B that are inverted to the end.
        `loss` is taken when an image is finished, over all patches in the sequence before that stop.

    Raises
    ------
    SettingsError
        If the grid has fewer than n + 1 patches.
    InversionDivergedError
        If pixels or loss are not finite, as `sparse.invert`.
    """
    grid, settings = task.grid, task.settings
    size, last = _patches_each(grid.num_patches, settings), len(settings.stops) - 1
    if size == 0:
        allowed = f"must have fewer entries than the {grid.num_patches} patches of an image"
        raise SettingsError(("inversion.stops", settings.stops, allowed))
    start = starting_images(len(labels), grid, settings, generator).to(labels.device)
    batch = InversionBatch(task, labels, start, terms=terms)
    noise = batch.result().images
    groups: list[Tensor] = []
    losses: list[Tensor] = []

    def leave(attention: Tensor) -> Tensor:
        """Record the most attended patches as an image, and return the places of the others."""
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
    """Return `images` at the ``(B, L)`` patches `kept` and `others` elsewhere; all ``(B, ch, S, S)``."""
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
