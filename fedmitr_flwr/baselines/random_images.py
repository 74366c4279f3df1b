"""Distillation on random images alone: the ensemble labels them, nothing is inverted.

A strong baseline that costs no inversion at all, and must stand in every comparison. There are as many images as
FedMITR's pool holds under the same settings, of the kind `distill.noise-kind`, and as many steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmitr_flwr.baselines.common import untrained_result
from fedmitr_flwr.checkpoints import Checkpoints
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.density import PatchSplit
from fedmitr_flwr.distill import Pool, distill, label_patches
from fedmitr_flwr.grid import PatchGrid
from fedmitr_flwr.models import build_model
from fedmitr_flwr.noise import random_images
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.pipeline import ClientModel, PipelineResult, student_start
from fedmitr_flwr.progress import DistillProgress
from fedmitr_flwr.relabel import LowTargets
from fedmitr_flwr.settings import Settings


def ensemble_on_random_images(
    settings: Settings,
    spec: ImageSpec,
    clients: Sequence[ClientModel],
    initial: Mapping[str, Tensor],
    *,
    seed: int,
    device: torch.device,
    observer: Observer,
    checkpoints: Checkpoints | None = None,
) -> PipelineResult:
    """See `pipeline.run_pipeline`."""
    result = untrained_result(settings, spec, clients, initial, device)
    student = build_model(settings.model, spec)
    grid = PatchGrid.of(student, spec)
    recipe = settings.distill.model_copy(update={"kl_weight": 1.0, "ce_weight": 0.0, "low_weight": 0.0})
    with observer.stage("distill"):
        student.load_state_dict(student_start(settings, clients, initial, result.ensemble, result.fedavg))
        generator = torch.Generator().manual_seed(seed)
        count = round(settings.inversion.images * (recipe.views + recipe.mix + recipe.noise))
        patches = grid.to_patches(random_images(recipe.noise_kind, count, grid, generator).to(device))
        pool = _pool(patches, label_patches(result.ensemble, patches, recipe))
        student.to(device)
        on_step = DistillProgress(observer, recipe.steps, student, pool)
        progress = checkpoints.progress() if checkpoints is not None else None
        distill(student, pool, recipe, generator=generator, on_step=on_step, progress=progress)
    state = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
    return replace(result, state=state, seconds=dict(observer.seconds))


def _pool(patches: Tensor, targets: Tensor) -> Pool:
    """A pool without synthetic images."""
    none = patches.new_zeros(0, patches.shape[1], dtype=torch.bool)
    low = LowTargets(targets.new_zeros(0, targets.shape[1]), none.new_zeros(0))
    labels = torch.full((len(patches),), -1, device=patches.device)
    return Pool(patches, labels, targets, PatchSplit(none), low)
