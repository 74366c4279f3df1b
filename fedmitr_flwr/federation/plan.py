"""What a run is going to need of the server's disk and memory, checked before any client is asked.

Memory has a budget (`run.memory-mb`). The process of the ServerApp holds, beside its libraries, a few uploads while it
collects, and after that the teachers
together with the activations of inversion or the images of distillation. Teachers and activations can do with less, at
a price in precision or time; what is left is what the settings ask for, and a run that cannot fit is refused.

Letters: B images, K teachers, N images of the pool.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.ensemble.engine.groups import STEP_ROWS
from fedmitr_flwr.ensemble.engine.packing import architecture_of
from fedmitr_flwr.ensemble.engine.passes import activation_bytes
from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits
from fedmitr_flwr.ensemble.ensemble import LABEL_ROWS
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.pipeline.methods import method_of
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError
from fedmitr_flwr.settings.home import expand

PROCESS_MB = 1000
"""Python with Flower, Ray, torch, timm and what evaluates and draws, without any model: measured, rounded up."""

log = logging.getLogger("fedmitr.run")

# The common initialisation as tensors, as arrays, in the messages, as the store's reference and its scratch.
_INITIAL_COPIES = 6
# One upload is written while the next comes; from the network four come at a time, as bytes and as arrays.
_UPLOADS_AT_ONCE = 8
# What an image takes while the pool is made: drawings need ten planes of its size, the pool three copies.
_POOL_PLANES, _POOL_COPIES = 10, 3
# Floats that autograd keeps of one token in one block, in units of the embedding.
_AUTOGRAD_FLOATS = 40


@dataclass(frozen=True)
class MemoryPlan:
    """What the process holds at most, in MiB, by what is held.

    Attributes
    ----------
    collection
        Uploads on their way to the disk, and the initialisation.
    teachers
        Of the ensemble, under `teacher_limit`.
    activations
        Between the forward and the backward pass of inversion, under `activation_limit`.
    distillation
        Pool and student, and the activations again where hard images are inverted beside them.
    teacher_limit, activation_limit
        For `inversion.teacher-memory-mb` and `inversion.activation-memory-mb`.
    """

    collection: int
    teachers: int
    activations: int
    distillation: int
    teacher_limit: int
    activation_limit: int

    @property
    def peak(self) -> int:
        """Of the whole process, its libraries included."""
        return PROCESS_MB + max(self.collection, self.teachers + max(self.activations, self.distillation))


def within_memory(settings: Settings, spec: ImageSpec, clients: int, device: torch.device) -> Settings:
    """Return the settings with limits under which the run keeps `run.memory-mb`; without a budget as they are.

    Parameters
    ----------
    settings, spec
        Of the run.
    clients
        Number of clients that may upload.
    device
        Of the stages. What lies in a GPU's memory does not count.

    Raises
    ------
    SettingsError
        If it can't be kept: says what is needed, of what, and which settings decide it.
    """
    budget = settings.run.memory_mb
    if budget == 0:
        return settings
    plan = plan_memory(settings, spec, clients, device)
    if plan.peak > budget:
        allowed = (
            f"the server needs about {plan.peak:,} MiB with {clients} clients: {PROCESS_MB} for its libraries; "
            f"then {plan.collection} for uploads under way, or {plan.teachers} for the teachers with "
            f"{plan.activations} for their activations (inversion.batch-size) or {plan.distillation} for distillation "
            "(inversion.images times distill.views + mix + noise, distill.adversarial-images, distill.batch-size; "
            "distill.feature-weight and teacher-weight unless both are 0)"
        )
        raise SettingsError(("run.memory-mb", budget, allowed))
    log.info("Memory: about %d MiB planned of %d", plan.peak, budget)
    limits: dict[str, RunConfigValue] = {
        "inversion.teacher-memory-mb": plan.teacher_limit,
        "inversion.activation-memory-mb": plan.activation_limit,
    }
    return settings.replace(**limits)


def plan_memory(settings: Settings, spec: ImageSpec, clients: int, device: torch.device) -> MemoryPlan:
    """Divide `run.memory-mb` up: teachers as precise as fit (else they stay on disk), and the rest to activations.

    Parameters
    ----------
    settings, spec, clients, device
        As for `within_memory`.
    """
    model = build_model(settings.model, spec)
    weights = 4 * sum(value.numel() for value in model.state_dict().values())
    collection = _mb((_INITIAL_COPIES + _UPLOADS_AT_ONCE) * weights)
    asked = settings.inversion
    if device.type != "cpu":
        return MemoryPlan(collection, 0, 0, 0, asked.teacher_memory_mb, asked.activation_memory_mb)
    # Averaging reads one tensor of all uploads at a time, in fp32 and with a sum in fp64.
    largest = 4 * max(value.numel() for value in model.state_dict().values())
    distillation = _distillation_mb(settings, model, spec, weights, clients) + _mb((clients + 2) * largest)
    every, fewest = _activations_mb(settings, model, spec, clients)
    # Hard images are inverted beside the pool.
    beside = distillation if settings.distill.adversarial_rounds > 0 else 0
    room = settings.run.memory_mb - PROCESS_MB - max(fewest + beside, distillation)
    limits = MemoryLimits(teachers=asked.teacher_memory_mb).within(room << 20, model, clients)
    teachers = _mb(limits.size(model, clients))
    room = settings.run.memory_mb - PROCESS_MB - teachers
    # What passes work in comes on top of what they keep.
    activation_limit = min(asked.activation_memory_mb, max(0, room - fewest - beside))
    activations = fewest + every if every <= activation_limit else fewest
    distillation += activations if beside else 0
    return MemoryPlan(collection, teachers, activations, distillation, limits.teachers, activation_limit)


def _activations_mb(settings: Settings, model: VisionTransformer, spec: ImageSpec, clients: int) -> tuple[int, int]:
    """What all teachers keep together; and what passes work in, with the activations of one step."""
    if not method_of(settings).inverts:
        return 0, _mb(_step_bytes(model, 1, max(1, LABEL_ROWS // _tokens(model, spec)), spec))
    B = min(settings.inversion.batch_size, settings.inversion.images)
    step = min(clients, max(1, STEP_ROWS // (B * _tokens(model, spec))))
    pixels = 4 * B * spec.channels * spec.image_size**2
    return _mb(_step_bytes(model, clients, B, spec)), _mb(3 * _step_bytes(model, step, B, spec) + 12 * pixels)


def _step_bytes(model: VisionTransformer, teachers: int, images: int, spec: ImageSpec) -> int:
    if architecture_of(model) is None:  # autograd keeps what it likes of one teacher at a time
        return _autograd_bytes(model, images, spec)
    return activation_bytes(model, teachers, images, PatchGrid.of(model, spec).num_patches, torch.float32)


def _autograd_bytes(model: VisionTransformer, images: int, spec: ImageSpec) -> int:
    tokens, heads = _tokens(model, spec), getattr(cast(Block, model.blocks[0]).attn, "num_heads", 1)
    return int(4 * images * tokens * len(model.blocks) * (_AUTOGRAD_FLOATS * model.embed_dim + 3 * heads * tokens))


def _distillation_mb(settings: Settings, model: VisionTransformer, spec: ImageSpec, weights: int, clients: int) -> int:
    distill = settings.distill
    if not method_of(settings).distils:
        return _mb(2 * weights)
    plane = 4 * spec.image_size**2
    hard = distill.adversarial_rounds * distill.adversarial_images * distill.views
    images = settings.inversion.images * (distill.views + distill.mix + distill.noise) + hard
    pool = images * plane * max(_POOL_COPIES * spec.channels, _POOL_PLANES)
    # Weights, gradient and two moments; the last three with the weights once more in a checkpoint on its way.
    student = 8 * weights
    training = pool * _POOL_COPIES / _POOL_PLANES + 2 * _autograd_bytes(model, distill.batch_size, spec)
    branches = 0.0
    if distill.learns_teachers:  # tokens in bf16, twice while their parts are joined; maps as the student's weights
        branches = 4 * images * clients * model.embed_dim + 32 * clients * model.embed_dim**2
    return _mb(max(pool, training) + student + branches)


def _tokens(model: VisionTransformer, spec: ImageSpec) -> int:
    return int(PatchGrid.of(model, spec).num_patches + model.num_prefix_tokens)


def _mb(size: float) -> int:
    return -int(-size // 2**20)


def upload_bytes(settings: Settings, spec: ImageSpec) -> int:
    """Size of one upload's weights."""
    return _parameters(settings, spec) * (4 if settings.train.upload_dtype == "fp32" else 2)


def disk_bytes(settings: Settings, spec: ImageSpec, clients: int) -> int:
    """What a run writes, at most: everything that may lie on the disk at one time.

    Parameters
    ----------
    settings, spec
        Of the run.
    clients
        Number of clients that may upload.
    """
    rounds = settings.run.rounds
    # Initialisation, and for each round the model; at the end the exported one and two states of model and optimiser.
    models = 4 * _parameters(settings, spec) * (1 + rounds + 1 + 2 * 3)
    if settings.distill.learns_teachers:  # their maps, with the optimiser's moments, and heads are in both states
        width, classes = build_model(settings.model, spec).embed_dim, spec.num_classes
        models += 2 * 4 * clients * (3 * width * (width + 1) + classes * (width + 1) + 2)
    images = 4 * settings.inversion.images * spec.channels * spec.image_size**2
    return rounds * (clients * upload_bytes(settings, spec) + images) + models


def check_disk(settings: Settings, spec: ImageSpec, clients: int) -> None:
    """Compare what a run is going to write with the space there is.

    Parameters
    ----------
    settings, spec, clients
        As for `disk_bytes`.

    Raises
    ------
    SettingsError
        If it does not fit, with both figures.
    """
    run = settings.run
    place = expand(run.output, "run.output").absolute()
    there = 0
    if run.resume:
        there = sum(file.stat().st_size for file in Path(run.resume).rglob("*") if file.is_file())
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    missing = disk_bytes(settings, spec, clients) - there
    if missing > free:
        allowed = (
            f"{place} has {free / 1e6:,.0f} MB free, the run needs about {missing / 1e6:,.0f} MB: "
            f"{clients} uploads of {upload_bytes(settings, spec) / 1e6:,.1f} MB and its own checkpoints"
        )
        raise SettingsError(("run.output", run.output, allowed))


def _parameters(settings: Settings, spec: ImageSpec) -> int:
    return sum(value.numel() for value in build_model(settings.model, spec).state_dict().values())
