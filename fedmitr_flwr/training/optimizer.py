"""Optimiser and learning-rate schedule of local training and of distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from fedmitr_flwr.settings import TrainSettings


def make_optimizer(
    model: nn.Module, settings: TrainSettings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimiser, with weight decay on matrices only, and its schedule over `steps` steps."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)
    schedule = WarmupCosine(steps, round(settings.warmup_fraction * steps), cosine=settings.schedule == "cosine")
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


@dataclass(frozen=True)
class WarmupCosine:
    """Factor on the peak learning rate: a linear rise over `warmup` steps, then a cosine to 0, or constant 1."""

    steps: int
    warmup: int
    cosine: bool = True

    def __call__(self, step: int) -> float:
        """Return the factor at a step counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.cosine:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))
