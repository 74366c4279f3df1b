"""Stage 4: distil the ensemble into one ViT on the synthetic images.

``L = KL(A(x) || s(x)) + CE(s(.), y) + l_low KL(q_low || s(x_low))`` with a weight for each term. The CE
term looks at the high-density patches (the paper's words) or at the full image (better in our
measurements). Three kinds of further images join the pool for the first term: augmented views of the
synthetic images (which keep y), images mixed from the patches of two, and random images. They are ours
and off at ``views = 1``, ``mix = 0``, ``noise = 0``. The ensemble labels the whole pool once: K teachers
cost more than the student, and the student passes over the pool several times.

Letters: B images, C classes, P patches of the full grid, N images of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from fedmitr_flwr.augment import augment
from fedmitr_flwr.density import PatchSplit, subsets
from fedmitr_flwr.ensemble import Ensemble
from fedmitr_flwr.grid import PatchGrid
from fedmitr_flwr.noise import random_images
from fedmitr_flwr.relabel import LowTargets, soften
from fedmitr_flwr.settings import DistillSettings, TrainSettings
from fedmitr_flwr.synthetic import SyntheticImages
from fedmitr_flwr.training import make_optimizer
from fedmitr_flwr.vit import forward_patches


@dataclass(frozen=True)
class Pool:
    """All that the student learns from, on one device.

    Attributes
    ----------
    patches
        ``(N, P, E)`` full images, cut into patches. The first B are the synthetic images as they were inverted.
    labels
        ``(N,)`` int64 pseudo-label y, or -1 for images that have none (mixed and noise).
    targets
        ``(N, C)`` A(x) of each full image, or its most probable class.
    split
        Density split of the first B.
    low_targets
        q_low of the first B.
    """

    patches: Tensor
    labels: Tensor
    targets: Tensor
    split: PatchSplit
    low_targets: LowTargets


@dataclass(frozen=True)
class LossTerms:
    """The three terms before they are weighted, in nats: scalar means over the step's images.

    An image without a term (a mixed or noise image has only the first) counts as 0 in it, so that each image
    weighs what the formula says, however many others there are.
    """

    kl: Tensor
    ce: Tensor
    low: Tensor

    def total(self, settings: DistillSettings) -> Tensor:
        """Weighted sum."""
        return settings.kl_weight * self.kl + settings.ce_weight * self.ce + settings.low_weight * self.low


class TrainingProgress(Protocol):
    """Keeps the state of the training loop from time to time, such as `checkpoints.Progress`."""

    def load(self) -> dict[str, Any] | None:
        """Return what was kept last."""

    def offer(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Keep what `make` returns, or do not."""


@torch.no_grad()
def make_pool(
    ensemble: Ensemble,
    synthetic: SyntheticImages,
    split: PatchSplit,
    low_targets: LowTargets,
    grid: PatchGrid,
    settings: DistillSettings,
    *,
    generator: torch.Generator,
    batch_size: int = 128,
) -> Pool:
    """Gather the images and let the ensemble label them.

    Parameters
    ----------
    synthetic, split, low_targets
        Of stages 1 to 3.
    settings
        How many further images; they are left out when ``kl_weight`` is 0.
    generator
        CPU generator of augmentation, mixing and noise.
    """
    patches, labels = gather(synthetic.images, synthetic.labels, grid, settings, generator)
    targets = label_patches(ensemble, patches, settings, batch_size)
    return Pool(patches, labels, targets, split, low_targets)


def gather(
    images: Tensor, labels: Tensor, grid: PatchGrid, settings: DistillSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Add augmented views, mixed images and random images to ``(B, ch, S, S)`` images.

    Returns
    -------
    patches
        ``(N, P, E)``; the first B are `images`.
    labels
        ``(N,)``; -1 for images that have none.
    """
    B, parts, named = len(labels), [images], [labels]
    for _ in range(settings.views - 1):
        parts.append(augment(images, settings.augment, generator))
        named.append(labels)
    if settings.kl_weight > 0:
        parts.append(mix_patches(images, round(settings.mix * B), grid, generator))
        parts.append(random_images(settings.noise_kind, round(settings.noise * B), grid, generator).to(images))
    patches = torch.cat([grid.to_patches(part) for part in parts])
    pseudo = torch.cat(named)
    return patches, torch.cat([pseudo, pseudo.new_full((len(patches) - len(pseudo),), -1)])


def unnamed_pool(patches: Tensor, targets: Tensor) -> Pool:
    """A pool of ``(N, P, E)`` images that have ``(N, C)`` targets and neither pseudo-labels nor a density split."""
    none = patches.new_zeros(0, patches.shape[1], dtype=torch.bool)
    low = LowTargets(targets.new_zeros(0, targets.shape[1]), none.new_zeros(0))
    labels = torch.full((len(patches),), -1, device=patches.device)
    return Pool(patches, labels, targets, PatchSplit(none), low)


@torch.no_grad()
def label_patches(ensemble: Ensemble, patches: Tensor, settings: DistillSettings, batch_size: int = 128) -> Tensor:
    """A(x) of full images, ``(N, P, E)``, or its most probable class alone; ``(N, C)``."""
    targets = torch.cat([ensemble(part).probabilities for part in patches.split(batch_size)])
    if settings.labels == "hard":
        return F.one_hot(targets.argmax(1), targets.shape[1]).to(targets)
    return targets


def distill(
    student: VisionTransformer,
    pool: Pool,
    settings: DistillSettings,
    *,
    generator: torch.Generator,
    on_step: Callable[[int, LossTerms], None] | None = None,
    progress: TrainingProgress | None = None,
    grow: Callable[[int], Pool | None] | None = None,
) -> None:
    """Train the student in place on random batches of the pool.

    Parameters
    ----------
    student
        A timm ViT that holds its first weights, on the device of the pool.
    pool
        Labelled images.
    settings
        Steps, optimiser and terms.
    generator
        CPU generator of the order.
    on_step
        Called with the step, from 0, and its detached terms, still on the device.
    progress
        Where the state of the loop is kept; what it holds at the start is gone on with.
    grow
        Called before each step with its number; a pool that it returns takes the place of the one before.

    Raises
    ------
    RuntimeError
        If the loss is not finite at the end.
    """
    recipe = TrainSettings(
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, warmup_fraction=0.05
    )
    optimizer, scheduler = make_optimizer(student, recipe, settings.steps)
    student.train()
    queue = torch.empty(0, dtype=torch.int64)
    total = torch.zeros(())
    start = 0
    if progress is not None and (kept := progress.load()) is not None:
        student.load_state_dict(kept["student"])
        optimizer.load_state_dict(kept["optimizer"])
        scheduler.load_state_dict(kept["scheduler"])
        generator.set_state(kept["generator"])
        queue, start = kept["queue"], kept["step"]
    for step in range(start, settings.steps):
        if grow is not None and (grown := grow(step)) is not None:
            pool, queue = grown, queue[:0]
            student.train()
        while len(queue) < settings.batch_size:
            queue = torch.cat([queue, torch.randperm(len(pool.labels), generator=generator)])
        rows, queue = queue[: settings.batch_size], queue[settings.batch_size :]
        terms = loss_terms(student, pool, rows.to(pool.labels.device), settings)
        total = terms.total(settings)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if on_step is not None:
            on_step(step, LossTerms(terms.kl.detach(), terms.ce.detach(), terms.low.detach()))
        if progress is not None:
            progress.offer(partial(_state, step + 1, student, optimizer, scheduler, generator, queue))
    student.eval()
    if not bool(torch.isfinite(total)):
        raise RuntimeError(f"distillation loss is not finite after {settings.steps} steps; lower distill.learning-rate")


def _state(
    step: int,
    student: VisionTransformer,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
    queue: Tensor,
) -> dict[str, Any]:
    """All that the loop needs to go on after `step` steps."""
    return {
        "step": step,
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "generator": generator.get_state(),
        "queue": queue.clone(),
    }


def loss_terms(student: VisionTransformer, pool: Pool, rows: Tensor, settings: DistillSettings) -> LossTerms:
    """Compute the terms of one step; a term of weight 0, or without images in this step, is 0.

    Parameters
    ----------
    rows
        ``(b,)`` int64 images of the pool.
    """
    kl = ce = low = torch.zeros((), device=rows.device)
    full_ce = settings.ce_weight > 0 and settings.ce_on == "full"
    if settings.kl_weight > 0 or full_ce:
        logits = forward_patches(student, pool.patches[rows], None).logits
        kl = kl_divergence(pool.targets[rows], logits, settings.temperature)
        if full_ce:
            ce = F.cross_entropy(logits, pool.labels[rows], ignore_index=-1, reduction="sum") / len(rows)
    still = rows[rows < len(pool.split.high)]  # synthetic images as they were inverted
    if settings.ce_weight > 0 and settings.ce_on == "high" and len(still):
        out = subset_logits(student, pool.patches[still], pool.split.high[still])
        ce = F.cross_entropy(out, pool.labels[still], reduction="sum") / len(rows)
    present = still[pool.low_targets.present[still]]
    if settings.low_weight > 0 and len(present):
        out = subset_logits(student, pool.patches[present], pool.split.low[present])
        low = kl_divergence(pool.low_targets.probabilities[present], out, 1.0) * (len(present) / len(rows))
    return LossTerms(kl, ce, low)


def kl_divergence(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(target^(1/T) || softmax(logits / T))``, mean over the images (Hinton et al. 2015); both ``(B, C)``."""
    if temperature != 1.0:
        target = soften(target, temperature)
    log_student = (logits.float() / temperature).log_softmax(-1)
    return F.kl_div(log_student, target, reduction="batchmean") * temperature**2


def subset_logits(student: VisionTransformer, patches: Tensor, mask: Tensor) -> Tensor:
    """Logits from [CLS] and the masked patches alone; ``(B, C)``, rows of images without any are zero."""
    parts, places = [], []
    for rows, index in subsets(mask):
        chosen = patches[rows].gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))
        parts.append(forward_patches(student, chosen, index).logits)
        places.append(rows)
    logits = torch.cat(parts)
    return logits.new_zeros(len(patches), logits.shape[1]).index_copy(0, torch.cat(places), logits)


def mix_patches(images: Tensor, count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """`count` images that take each patch from one of two images, in random proportion; ``(count, ch, S, S)``."""
    first, second = torch.randint(len(images), (2, count), generator=generator).to(images.device)
    share = torch.rand(count, 1, generator=generator)
    mask = (torch.rand(count, grid.num_patches, generator=generator) < share).to(images.device)
    return grid.to_images(torch.where(mask[..., None], grid.to_patches(images[first]), grid.to_patches(images[second])))
