"""The steps of which FedMITR and its baselines consist.

Letters: B images, K teachers, C classes, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits, PagedTeachers, load_teachers
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.ensemble.weighting import Knowledge, class_weights, evidence
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.inputs import PipelineInputs, StageContext
from fedmitr_flwr.pipeline.outliers import trust
from fedmitr_flwr.pipeline.progress import FINISHED_SHOWN, DistillProgress, InversionProgress
from fedmitr_flwr.pipeline.shared_moments import expert_state, pooled_moments
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import DistillSettings, Settings
from fedmitr_flwr.stages.density import split_patches
from fedmitr_flwr.stages.distillation.distill import distill
from fedmitr_flwr.stages.distillation.frozen import StudentTrunk, clients_part, freeze, student_trunk
from fedmitr_flwr.stages.distillation.pool import Pool
from fedmitr_flwr.stages.distillation.teacher_heads import Branches
from fedmitr_flwr.stages.inversion.batch import NOBODY
from fedmitr_flwr.stages.inversion.methods import images_per_run, invert_batch, runs
from fedmitr_flwr.stages.relabel import RelabelledImages, relabel
from fedmitr_flwr.stages.synthetic import SyntheticImages


def make_ensemble(inputs: PipelineInputs) -> tuple[Ensemble, Tensor]:
    """Load the uploads as teachers and compute their weights.

    Returns
    -------
    ensemble
        The weighted teachers, on the inputs' device, with the expert that `Settings.expert` names.
    known
        ``(C',)`` int64 classes that the ensemble knows: those for which at least one client has evidence above 0; with
        an expert from moments those of which some client has images.

    Raises
    ------
    ValueError, SettingsError
        If moments are needed and a client withheld them, or the model has two heads.
    """
    settings, device = inputs.settings, inputs.device
    limits = MemoryLimits(settings.inversion.activation_memory_mb, settings.inversion.teacher_memory_mb)
    blank = build_model(settings.model, inputs.spec)
    K = len(inputs.uploads)
    share = limits.teachers * K // (K + bool(settings.expert))  # of K teachers among all models
    teachers = load_teachers(blank, inputs.states, replace(limits, teachers=share), device)
    if isinstance(teachers, PagedTeachers):
        reason = "read from disk for every pass, because they exceed inversion.teacher-memory-mb"
        inputs.observer.event("ensemble", teachers=reason)
    known_of = evidence_of(inputs)
    heard = None
    if settings.ensemble.outlier_guard:
        grid = PatchGrid.of(blank, inputs.spec)
        heard = trust(known_of, teachers, inputs.initial, grid, settings, inputs.observer)
    weights = class_weights(known_of, settings.ensemble.power, heard)
    inputs.observer.snapshot("ensemble", evidence=known_of, weights=weights)
    known, expert = known_of.sum(0) > 0, None
    if settings.expert:
        expert = blank
        if settings.expert == "moments":
            pooled = pooled_moments(inputs)
            known, state = pooled.present, expert_state(inputs, pooled)
        else:
            state = _scaled_logits(inputs.merged(weights), settings.ensemble.merged_weight)
        expert.load_state_dict(state)
        expert.to(device)
    ensemble = Ensemble(teachers, weights.to(device), limits, rule=settings.ensemble.combine, expert=expert)
    if ensemble.shared_blocks:
        shared = f"{ensemble.shared_blocks} of {len(blank.blocks)}"
        inputs.observer.event("ensemble", blocks_that_no_client_trained=shared)
    return ensemble, known.nonzero().squeeze(1).to(device)


def evidence_of(inputs: PipelineInputs) -> Tensor:
    """Return how much each client knows of each class, ``(K, C)``, by `ensemble.weighting`."""
    head_updates = torch.stack([state["head.weight"] - inputs.initial["head.weight"] for state in inputs.states])
    known = Knowledge(inputs.num_examples, inputs.histograms, head_updates)
    return evidence(inputs.settings.ensemble.weighting, known)


def invert_all(context: StageContext, classes: Tensor, inputs: PipelineInputs) -> SyntheticImages:
    """Run stage 1 in batches. The classes take turns as labels, and each batch has its own seed."""
    settings, observer, checkpoints = context.settings.inversion, inputs.observer, inputs.checkpoints
    count = runs(settings)
    labels = classes[torch.arange(count, device=classes.device) % len(classes)]
    parts = []
    progress = InversionProgress(observer, settings, len(classes)) if observer.watched else None
    for number, batch in enumerate(labels.split(settings.batch_size)):
        watch = progress.of_batch(number) if progress else NOBODY
        make = partial(invert_batch, context.inversion, batch, number=number, seed=inputs.seed, watch=watch)
        parts.append(make() if checkpoints is None else checkpoints.batch(number, make, inputs.device))
        done = sum(len(part.labels) for part in parts)
        observer.event("invert", images=f"{done}/{count * images_per_run(settings)}", loss=float(parts[-1].loss.mean()))
    synthetic = SyntheticImages.join(parts)
    shown = synthetic.labels.argsort(stable=True)[:FINISHED_SHOWN]
    observer.snapshot("finished", images=synthetic.images[shown], labels=synthetic.labels[shown])
    return synthetic


def _scaled_logits(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return a state dict whose model has `factor` times the logits."""
    return {name: factor * value if name.startswith("head") else value for name, value in state.items()}


def images_in_memory(settings: Settings) -> tuple[int, int]:
    """Return the largest number of images of pools in memory, and how many of them have a density split.

    With hard images the pool grows, and the old pool is in memory while the new one is joined.
    """
    distill, each = settings.distill, images_per_run(settings.inversion)
    made = runs(settings.inversion) * each
    hard = distill.adversarial_rounds * -(-distill.adversarial_images // each) * each
    further = (distill.views - 1) * (made + hard) + math.ceil((distill.mix + distill.noise) * made) + 1
    pools = 2 if hard else 1
    return pools * (made + hard + further), pools * (made + hard)


def freeze_student(
    inputs: PipelineInputs,
    ensemble: Ensemble,
    student: VisionTransformer,
    settings: DistillSettings,
    images: tuple[int, int] | None = None,
) -> StudentTrunk | None:
    """Freeze the weights that `distill.trainable` excludes, and move the student to the inputs' device.

    Parameters
    ----------
    student
        The student with its starting weights.
    settings
        Settings of the distillation.
    images
        Largest number of images of pools in memory, and of those with a density split; None: `images_in_memory`.

    Returns
    -------
    StudentTrunk | None
        The frozen blocks whose output the pool keeps; None if no block is frozen or the output does not fit in
        `distill.cache-memory-mb`.

    Raises
    ------
    SettingsError
        If the model has fewer blocks than `distill.trainable` names.
    """
    part = clients_part(settings.trainable, ensemble)
    student.to(inputs.device)
    freeze(student, part)
    trunk = student_trunk(student, part, ensemble, settings, *(images or images_in_memory(inputs.settings)))
    if part.blocks is not None:
        kept = "none" if trunk is None else str(trunk.dtype).removeprefix("torch.")
        inputs.observer.event("distill", frozen_blocks=f"{part.blocks} of {len(student.blocks)}", kept_tokens=kept)
    return trunk


def distilled(
    inputs: PipelineInputs,
    ensemble: Ensemble,
    student: VisionTransformer,
    pool: Pool,
    settings: DistillSettings,
    generator: torch.Generator,
    grow: Callable[[int], Pool | None] | None = None,
) -> dict[str, Tensor]:
    """Run stage 4 with progress reports and checkpoints, and return the student's state dict on the CPU.

    Only the parameters that `freeze_student` left trainable are trained.

    With `grow` (see `distill.distill`) no checkpoints are written, so an interrupted run repeats distillation from its
    start.
    """
    student.to(inputs.device)
    report = DistillProgress(inputs.observer, settings.steps, student, pool)
    progress = inputs.checkpoints.progress() if inputs.checkpoints is not None and grow is None else None
    features = pool.features()
    branches = None if features is None else Branches.of(ensemble, features)
    distill(
        student,
        pool,
        settings,
        generator=generator,
        branches=branches,
        on_step=report,
        progress=progress,
        grow=grow,
    )
    return cpu_state(student)


def cpu_state(model: VisionTransformer) -> dict[str, Tensor]:
    """Return a copy of a model's state dict on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def split_and_relabel(
    context: StageContext, synthetic: SyntheticImages, observer: Observer | None = None
) -> RelabelledImages:
    """Run stages 2 and 3. The attention over the full grid is computed again, from the finished images."""
    ensemble, settings = context.ensemble, context.settings
    patches = context.grid.to_patches(synthetic.images)
    attention, seen = [], []
    for part, labels in zip(patches.split(256), synthetic.labels.split(256), strict=True):
        out = ensemble(part, attention=True, labels=labels)
        assert out.attention is not None
        attention.append(out.attention)
        seen.append(out.probabilities)
    split = split_patches(synthetic.kept, torch.cat(attention), settings.density)
    if observer is not None:
        observer.snapshot("density", attention=torch.cat(attention), probabilities=torch.cat(seen))
    return RelabelledImages(synthetic, split, relabel(ensemble, patches, split, settings.relabel))
