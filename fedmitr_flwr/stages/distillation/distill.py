"""Stage 4: distil the ensemble into one ViT on the synthetic images.

The loss is ``L = KL(A(x) || s(x)) + CE(s(.), y) + l_low KL(q_low || s(x_low))`` with a weight for each term. The
student's input in the cross-entropy is the high-density patches, as the paper states, or the full image, which was
better in our measurements. Two further terms use the outputs of each teacher and are not in the paper
(`teacher_heads.py`). `pool.py` collects the images on which the student is trained.

Letters: B images, K teachers, C classes, P patches of the full grid, N images of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedmitr_flwr.models.trainable import train_mode
from fedmitr_flwr.settings import DistillSettings, TrainSettings
from fedmitr_flwr.stages.distillation.losses import LossTerms, loss_terms
from fedmitr_flwr.stages.distillation.pool import Pool
from fedmitr_flwr.stages.distillation.teacher_heads import Branches
from fedmitr_flwr.training.optimizer import make_optimizer


class TrainingProgress(Protocol):
    """Saves the state of the training loop from time to time, such as `checkpoints.Progress`."""

    def load(self) -> dict[str, Any] | None:
        """Return the state that was saved last; None if there is none."""

    def offer(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Save the state that `make` returns, if it is time to; otherwise do not call it."""


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
        A timm ViT with its starting weights, on the device of the pool. Parameters without `requires_grad` are not
        trained; leading blocks without a trained parameter run in eval mode.
    pool
        Labelled images.
    settings
        Number of steps, optimiser and weights of the loss terms.
    generator
        CPU generator of the order of the images.
    branches
        Maps from the student's token to the teachers' tokens, which are trained too. None: the loss terms that need
        them are left out.
    on_step
        Called after each step with its number, from 0, and its detached loss terms, still on the device.
    progress
        Saves the state of the loop. If it holds a state, training continues from there.
    grow
        Called before each step with its number. If it returns a pool, that pool replaces the current one.

    Raises
    ------
    RuntimeError
        If the loss of the last step is not finite.
    """
    recipe = TrainSettings(
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, warmup_fraction=0.05
    )
    learner = nn.ModuleList([student] if branches is None else [student, branches])
    optimizer, scheduler = make_optimizer(learner, recipe, settings.steps)
    train_mode(student)
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
            train_mode(student)
        while len(queue) < settings.batch_size:
            queue = torch.cat([queue, torch.randperm(len(pool), generator=generator)])
        rows, queue = queue[: settings.batch_size], queue[settings.batch_size :]
        terms = loss_terms(student, pool.batch(rows), settings, branches)
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
        raise RuntimeError(
            f"the loss of distillation is not finite after {settings.steps} steps; lower distill.learning-rate"
        )


def _state(
    step: int,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
    queue: Tensor,
) -> dict[str, Any]:
    """Return the state from which the loop can continue after `step` steps."""
    return {
        "step": step,
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "generator": generator.get_state(),
        "queue": queue.clone(),
    }
