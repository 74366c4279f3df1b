"""Distillation on random images alone, which the ensemble labels. Nothing is inverted.

This is a strong baseline without the cost of inversion, so every comparison should include it. The images are of the
kind `distill.noise-kind`. There are as many as FedMITR's pool holds with the same settings, and as many steps. The
student is trained by KL to the ensemble and, as in FedMITR, by the outputs of each teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import Method, the_ensemble, untrained_result
from fedmitr_flwr.pipeline.starts import student_start
from fedmitr_flwr.pipeline.steps import distilled, freeze_student
from fedmitr_flwr.stages.distillation.pool import label_patches, unnamed_pool
from fedmitr_flwr.stages.random_images.families import random_images


def ensemble_on_random_images(inputs: PipelineInputs) -> PipelineResult:
    """Distil on random images; see `fedmitr.run_pipeline`."""
    kind = inputs.settings.distill.noise_kind
    return distil_on(inputs, lambda count, grid, generator: random_images(kind, count, grid, generator))


def distil_on(inputs: PipelineInputs, draw: Callable[[int, PatchGrid, torch.Generator], Tensor]) -> PipelineResult:
    """Distil on images that have neither pseudo-labels nor a density split.

    Parameters
    ----------
    inputs
        As for `fedmitr.run_pipeline`.
    draw
        Returns ``(N, ch, S, S)`` fp32 normalised images, given their number N, the grid and a CPU generator.

    Returns
    -------
    PipelineResult
        A result without synthetic images.

    Raises
    ------
    SettingsError, ValueError, RuntimeError
        As for `fedmitr.run_pipeline`.
    """
    settings, result = inputs.settings, untrained_result(inputs)
    student = build_model(settings.model, inputs.spec)
    grid = PatchGrid.of(student, inputs.spec)
    recipe = settings.distill.model_copy(update={"kl_weight": 1.0, "ce_weight": 0.0, "low_weight": 0.0})
    with inputs.observer.stage("distill"):
        student.load_state_dict(student_start(inputs, result.ensemble))
        generator = torch.Generator().manual_seed(inputs.seed)
        count = round(settings.inversion.images * (recipe.views + recipe.mix + recipe.noise))
        patches = grid.to_patches(draw(count, grid, generator).to(inputs.device))
        trunk = freeze_student(inputs, result.ensemble, student, recipe, (count, 0))
        pool = unnamed_pool(patches, label_patches(result.ensemble, patches, recipe, trunk=trunk))
        state = distilled(inputs, result.ensemble, student, pool, recipe, generator)
    return replace(result, state=state, seconds=dict(inputs.observer.seconds))


RANDOM_IMAGES = Method(
    ensemble_on_random_images,
    "distillation on random images",
    lambda settings: (
        f"It labelled random images with {the_ensemble(settings)} and distilled the ensemble into this model on them."
    ),
    inverts=False,
)
