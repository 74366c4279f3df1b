"""Stage 4: distil the ensemble into one ViT on the synthetic images.

``L = KL(A(x) || s(x)) + CE(s(.), y) + l_low KL(q_low || s(x_low))`` with a weight for each term. The CE
term looks at the high-density patches (the paper's words) or at the full image (better in our
measurements). Two further terms, which are ours, take what each teacher makes of an image beside what they say
together (`branches.py`). `pool.py` gathers what the student learns from.

Letters: B images, K teachers, C classes, P patches of the full grid, N images of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from fedmitr_flwr.branches import Branches, last_norms
from fedmitr_flwr.density import subsets
from fedmitr_flwr.pool import Pool
from fedmitr_flwr.relabel import soften
from fedmitr_flwr.settings import DistillSettings, TrainSettings
from fedmitr_flwr.training import make_optimizer
from fedmitr_flwr.vit import forward_patches


@dataclass(frozen=True)
class LossTerms:
    """The terms before they are weighted, in nats but for `feature`: scalar means over the step's images.

    An image without a term (a mixed or noise image has only the first) counts as 0 in it, so that each image
    weighs what the formula says, however many others there are.

    Attributes
    ----------
    kl, ce, low
        Of the formula.
    feature
        Squared distance from the teachers' [CLS] tokens, in units of their variances; see `branches.Branches`.
    teacher
        KL to what the teachers' heads read in their own tokens, likewise.
    """

    kl: Tensor
    ce: Tensor
    low: Tensor
    feature: Tensor
    teacher: Tensor

    def total(self, settings: DistillSettings) -> Tensor:
        """Weighted sum."""
        ours = settings.kl_weight * self.kl + settings.ce_weight * self.ce + settings.low_weight * self.low
        return ours + settings.feature_weight * self.feature + settings.teacher_weight * self.teacher

    def detach(self) -> LossTerms:
        """The same without a graph."""
        return LossTerms(*(getattr(self, field.name).detach() for field in fields(self)))

    def values(self) -> dict[str, float]:
        """Each by its name."""
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


class TrainingProgress(Protocol):
    """Keeps the state of the training loop from time to time, such as `checkpoints.Progress`."""

    def load(self) -> dict[str, Any] | None:
        """Return what was kept last."""

    def offer(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Keep what `make` returns, or do not."""


def distill(
    student: VisionTransformer,
    pool: Pool,
    settings: DistillSettings,
    *,
    generator: torch.Generator,
    branches: Branches | None = None,
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
    branches
        To the teachers; they learn beside the student. None: without the terms that need them.
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
    learner = nn.ModuleList([student] if branches is None else [student, branches])
    optimizer, scheduler = make_optimizer(learner, recipe, settings.steps)
    student.train()
    queue = torch.empty(0, dtype=torch.int64)
    total = torch.zeros(())
    start = 0
    if progress is not None and (kept := progress.load()) is not None:
        learner.load_state_dict(kept["learner"])
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
        terms = loss_terms(student, pool, rows.to(pool.labels.device), settings, branches)
        total = terms.total(settings)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if on_step is not None:
            on_step(step, terms.detach())
        if progress is not None:
            progress.offer(partial(_state, step + 1, learner, optimizer, scheduler, generator, queue))
    student.eval()
    if not bool(torch.isfinite(total)):
        raise RuntimeError(f"distillation loss is not finite after {settings.steps} steps; lower distill.learning-rate")


def _state(
    step: int,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
    queue: Tensor,
) -> dict[str, Any]:
    """All that the loop needs to go on after `step` steps."""
    return {
        "step": step,
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "generator": generator.get_state(),
        "queue": queue.clone(),
    }


def loss_terms(
    student: VisionTransformer, pool: Pool, rows: Tensor, settings: DistillSettings, branches: Branches | None = None
) -> LossTerms:
    """Compute the terms of one step; a term of weight 0, or without images in this step, is 0.

    Parameters
    ----------
    rows
        ``(b,)`` int64 images of the pool.
    branches
        As for `distill`.
    """
    kl = ce = low = feature = teacher = torch.zeros((), device=rows.device)
    full_ce = settings.ce_weight > 0 and settings.ce_on == "full"
    if settings.kl_weight > 0 or full_ce or branches is not None:
        seen = forward_patches(student, pool.patches[rows], None)
        kl = kl_divergence(pool.targets.probabilities[rows], seen.logits, settings.temperature)
        if full_ce:
            ce = F.cross_entropy(seen.logits, pool.labels[rows], ignore_index=-1, reduction="sum") / len(rows)
        if branches is not None and pool.targets.features is not None:
            feature, teacher = branches(last_norms(student)(seen.features), pool.targets.features[rows])
    still = rows[rows < len(pool.split.high)]  # synthetic images as they were inverted
    if settings.ce_weight > 0 and settings.ce_on == "high" and len(still):
        out = subset_logits(student, pool.patches[still], pool.split.high[still])
        ce = F.cross_entropy(out, pool.labels[still], reduction="sum") / len(rows)
    present = still[pool.low_targets.present[still]]
    if settings.low_weight > 0 and len(present):
        out = subset_logits(student, pool.patches[present], pool.split.low[present])
        low = kl_divergence(pool.low_targets.probabilities[present], out, 1.0) * (len(present) / len(rows))
    return LossTerms(kl, ce, low, feature, teacher)


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
