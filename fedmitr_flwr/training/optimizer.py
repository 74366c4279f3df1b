"""Optimiser and learning-rate schedule of local training and of distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fedmitr_flwr.models.trainable import rate_factor
from fedmitr_flwr.settings import TrainSettings


def make_optimizer(
    model: nn.Module, settings: TrainSettings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimiser, with weight decay on matrices only, and its schedule over `steps` steps.

    With `train.layer-decay` below 1 the model must be a ViT, and each of its blocks has its own peak learning rate.
    """
    groups = _groups(model, settings)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)
    schedule = WarmupCosine(steps, round(settings.warmup_fraction * steps), cosine=settings.schedule == "cosine")
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


def _groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Return the trained parameters by learning rate, and for each rate the matrices before the others."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    factors = dict.fromkeys((name for name, _ in trained), 1.0)
    if settings.layer_decay < 1.0:
        depth = len(cast(VisionTransformer, model).blocks)
        factors = {name: rate_factor(name, depth, settings.layer_decay) for name, _ in trained}
    groups: list[dict[str, Any]] = []
    for factor in sorted(set(factors.values()) or {1.0}, reverse=True):
        rate = settings.learning_rate * factor
        own = [parameter for name, parameter in trained if factors[name] == factor]
        matrices = [parameter for parameter in own if parameter.ndim > 1]
        others = [parameter for parameter in own if parameter.ndim <= 1]
        groups.append({"params": matrices, "weight_decay": settings.weight_decay, "lr": rate})
        groups.append({"params": others, "weight_decay": 0.0, "lr": rate})
    return groups


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
