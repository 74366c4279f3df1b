"""Plan the memory and disk space of the server, before any client is asked.

`run.memory-mb` limits the memory of the ServerApp's process. Besides its libraries, the process holds a few uploads
while it collects them. Afterwards it holds the teachers, together with the activations of inversion or with the pool
of distillation. Teachers and activations can be held in less memory, at a cost in precision or time; all else is
determined by the settings. The plan chooses limits for teachers and activations so that the run fits. If there are no
such limits, the run is refused.

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
from fedmitr_flwr.federation.uploads.layout import Layout
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.moments import Moments
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.models.trainable import trained_part
from fedmitr_flwr.pipeline.methods import method_of
from fedmitr_flwr.pipeline.steps import images_in_memory
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError
from fedmitr_flwr.settings.home import expand
from fedmitr_flwr.stages.distillation.frozen import token_numbers

PROCESS_MB = 1000
"""MiB of Python with Flower, Ray, torch, timm and the packages for evaluation and figures, without any model.

Measured, and rounded up.
"""

log = logging.getLogger("fedmitr.run")

# Copies of the common initialisation: tensors, arrays, messages, and the reference and work space of the upload store.
_INITIAL_COPIES = 6
# One upload is written while the next arrives. Over a network four arrive at a time, each as bytes and as arrays.
_UPLOADS_AT_ONCE = 8
# Memory for an image while the pool is made: ten planes of its size to draw random images, three copies in the pool.
_POOL_PLANES, _POOL_COPIES = 10, 3
# Full matrices in fp64 while a head is computed from moments, as a multiple of a triangle in fp32: six, with a margin.
_MOMENT_MATRICES = 32
# Gram matrices of the largest linear layer in fp64 while updates are merged by them, as a multiple of its weights in
# fp32: its inputs are up to four times as many as its outputs, so each is eight times as large, and four are held.
_GRAM_TENSORS = 40
_BY_GRAMS = {"ace-merging", "wudi-merging"}
# Number of floats that autograd keeps for each token in each block, as a multiple of the embedding width.
_AUTOGRAD_FLOATS = 40


@dataclass(frozen=True)
class MemoryPlan:
    """Upper bounds on the memory of the ServerApp's process, in MiB, by purpose.

    Attributes
    ----------
    collection
        Uploads that arrive or are being written, and copies of the initialisation.
    teachers
        Teachers of the ensemble, with `teacher_limit`.
    activations
        Activations and work space of inversion, with `activation_limit`.
    distillation
        Pool and student with the output of its frozen blocks; with hard images, also the activations of their
        inversion.
    teacher_limit, activation_limit, cache_limit
        Limits for `inversion.teacher-memory-mb`, `inversion.activation-memory-mb` and `distill.cache-memory-mb`.
    """

    collection: int
    teachers: int
    activations: int
    distillation: int
    teacher_limit: int
    activation_limit: int
    cache_limit: int

    @property
    def peak(self) -> int:
        """Peak memory of the whole process in MiB, including its libraries."""
        return PROCESS_MB + max(self.collection, self.teachers + max(self.activations, self.distillation))


def within_memory(settings: Settings, spec: ImageSpec, clients: int, device: torch.device) -> Settings:
    """Return the settings with memory limits that keep the run within `run.memory-mb`; unchanged if that is 0.

    Parameters
    ----------
    settings, spec
        Settings of the run, and the specification of its images.
    clients
        Number of clients that may upload.
    device
        Device of the stages. The memory of a GPU is not counted.

    Raises
    ------
    SettingsError
        If no limits keep the run within `run.memory-mb`. The message gives the memory needed for each purpose and the
        settings that determine it.
    """
    budget = settings.run.memory_mb
    if budget == 0:
        return settings
    plan = plan_memory(settings, spec, clients, device)
    if plan.peak > budget:
        allowed = (
            f"the server needs about {plan.peak:,} MiB with {clients} clients: {PROCESS_MB} for its libraries plus the "
            f"largest of these: {plan.collection} for arriving uploads; {plan.teachers} for the teachers and "
            f"{plan.activations} for activations (depends on inversion.batch-size); {plan.teachers} for the teachers "
            f"and {plan.distillation} for distillation (depends on distill.batch-size and on inversion.images times "
            "distill.views + mix + noise; on distill.adversarial-images with adversarial-rounds; and on "
            "distill.feature-weight and teacher-weight unless both are 0)"
        )
        raise SettingsError(("run.memory-mb", budget, allowed))
    log.info("Memory: about %d MiB planned, run.memory-mb = %d", plan.peak, budget)
    limits: dict[str, RunConfigValue] = {
        "inversion.teacher-memory-mb": plan.teacher_limit,
        "inversion.activation-memory-mb": plan.activation_limit,
        "distill.cache-memory-mb": plan.cache_limit,
    }
    return settings.replace(**limits)


def plan_memory(settings: Settings, spec: ImageSpec, clients: int, device: torch.device) -> MemoryPlan:
    """Divide `run.memory-mb` between teachers and activations.

    The teachers come first: in fp32 if they fit, otherwise in bf16, otherwise read from disk at each use. The
    activations get the rest. Blocks that `train.trainable` leaves out are the same in all teachers and count once.

    Parameters
    ----------
    settings, spec, clients, device
        As for `within_memory`.
    """
    model = build_model(settings.model, spec)
    weights = 4 * sum(value.numel() for value in model.state_dict().values())
    moments = _moments_bytes(settings, model, spec)
    part = trained_part(settings.train, model.state_dict())
    upload = Layout.of(part.uploaded(model.state_dict())).size("fp32")
    collection = _mb(_INITIAL_COPIES * weights + _UPLOADS_AT_ONCE * (upload + moments))
    asked = settings.inversion
    if device.type != "cpu":
        limits = asked.teacher_memory_mb, asked.activation_memory_mb, settings.distill.cache_memory_mb
        return MemoryPlan(collection, 0, 0, 0, *limits)
    # Averaging reads one tensor of all uploads at a time, in fp32, and sums them in fp64.
    largest = 4 * max(value.numel() for value in model.state_dict().values())
    merging = _GRAM_TENSORS if {settings.run.method, settings.distill.start} & _BY_GRAMS else 0
    # The moments of all uploads stay in memory; pooling them holds a few matrices of D x D in fp64.
    kept = _mb((clients + 2 + merging) * largest + (clients + _MOMENT_MATRICES) * moments)
    distillation = _distillation_mb(settings, model, spec, weights, clients) + kept
    every, fewest = _activations_mb(settings, model, spec, clients + bool(settings.expert))
    # Hard images are inverted while the pool is in memory.
    beside = distillation if settings.distill.adversarial_rounds > 0 else 0
    room = settings.run.memory_mb - PROCESS_MB - max(fewest + beside, distillation)
    models = clients + bool(settings.expert)
    shared = part.frozen_blocks or 0  # blocks that all teachers share are held once
    held = MemoryLimits(teachers=asked.teacher_memory_mb).within(room << 20, model, models, shared)
    teachers = _mb(held.size(model, models, shared))
    room = settings.run.memory_mb - PROCESS_MB - teachers
    # The passes need work space in addition to the activations that they keep.
    activation_limit = min(asked.activation_memory_mb, max(0, room - fewest - beside))
    activations = fewest + every if every <= activation_limit else fewest
    distillation += activations if beside else 0
    cache_limit = min(settings.distill.cache_memory_mb, max(0, room - distillation))
    distillation += min(cache_limit, _cache_mb(settings, model))
    return MemoryPlan(
        collection, teachers, activations, distillation, held.teachers, activation_limit, cache_limit
    )  # fmt: skip


def _cache_mb(settings: Settings, model: VisionTransformer) -> int:
    """Return MiB of the output of the student's frozen blocks for the pool, if a block is frozen, as fp32."""
    if settings.distill.trainable == "all" or not method_of(settings).distils:
        return 0
    return _mb(4 * token_numbers(model, 1, settings.distill, *images_in_memory(settings)))


def _activations_mb(settings: Settings, model: VisionTransformer, spec: ImageSpec, models: int) -> tuple[int, int]:
    """Return MiB of the activations that all models keep, and of work space with the activations of one step."""
    if not method_of(settings).inverts:
        return 0, _mb(_step_bytes(model, 1, max(1, LABEL_ROWS // _tokens(model, spec)), spec))
    B = min(settings.inversion.batch_size, settings.inversion.images)
    step = min(models, max(1, STEP_ROWS // (B * _tokens(model, spec))))
    pixels = 4 * B * spec.channels * spec.image_size**2
    return _mb(_step_bytes(model, models, B, spec)), _mb(3 * _step_bytes(model, step, B, spec) + 12 * pixels)


def _step_bytes(model: VisionTransformer, teachers: int, images: int, spec: ImageSpec) -> int:
    if architecture_of(model) is None:  # not packed: autograd runs one teacher at a time and keeps its activations
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
    # Weights, gradient and two moments, and as much again for a checkpoint that is being written.
    student = 8 * weights
    training = pool * _POOL_COPIES / _POOL_PLANES + 2 * _autograd_bytes(model, distill.batch_size, spec)
    branches = 0.0
    if distill.learns_teachers:  # tokens in bf16, twice while they are joined; maps with copies as of the student
        branches = 4 * images * clients * model.embed_dim + 32 * clients * model.embed_dim**2
    return _mb(max(pool, training) + student + branches)


def _tokens(model: VisionTransformer, spec: ImageSpec) -> int:
    return int(PatchGrid.of(model, spec).num_patches + model.num_prefix_tokens)


def _mb(size: float) -> int:
    return -int(-size // 2**20)


def upload_bytes(settings: Settings, spec: ImageSpec) -> int:
    """Return the size of one upload in bytes: the trained tensors, and moments if the run asks for them."""
    model = build_model(settings.model, spec)
    state = model.state_dict()
    weights = Layout.of(trained_part(settings.train, state).uploaded(state)).size(settings.train.upload_dtype)
    return weights + _moments_bytes(settings, model, spec)


def _moments_bytes(settings: Settings, model: VisionTransformer, spec: ImageSpec) -> int:
    if not settings.train.share_moments:
        return 0
    return Moments.blank(spec.num_classes, model.num_features).size()


def disk_bytes(settings: Settings, spec: ImageSpec, clients: int) -> int:
    """Return an upper bound on the bytes of a run's files that are on disk at the same time.

    Parameters
    ----------
    settings, spec
        Settings of the run, and the specification of its images.
    clients
        Number of clients that may upload.
    """
    rounds = settings.run.rounds
    # The initialisation, a model for each round, the exported model, and two checkpoints of model and optimiser.
    models = 4 * _parameters(settings, spec) * (1 + rounds + 1 + 2 * 3)
    if settings.distill.learns_teachers:  # both checkpoints hold the maps with their moments, and the teachers' heads
        width, classes = build_model(settings.model, spec).embed_dim, spec.num_classes
        models += 2 * 4 * clients * (3 * width * (width + 1) + classes * (width + 1) + 2)
    images = 4 * settings.inversion.images * spec.channels * spec.image_size**2
    return rounds * (clients * upload_bytes(settings, spec) + images) + models


def check_disk(settings: Settings, spec: ImageSpec, clients: int) -> None:
    """Check that the disk has enough free space for the files of a run.

    Parameters
    ----------
    settings, spec, clients
        As for `disk_bytes`.

    Raises
    ------
    SettingsError
        If it has not. The message gives the free and the needed space.
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
            f"{clients} uploads of {upload_bytes(settings, spec) / 1e6:,.1f} MB, checkpoints and results"
        )
        raise SettingsError(("run.output", run.output, allowed))


def _parameters(settings: Settings, spec: ImageSpec) -> int:
    return sum(value.numel() for value in build_model(settings.model, spec).state_dict().values())
