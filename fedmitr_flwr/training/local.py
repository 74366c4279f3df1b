"""Local training of one client on its images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedmitr_flwr.data import ImageSet, ImageSpec
from fedmitr_flwr.models.vit import forward_images
from fedmitr_flwr.settings import TrainSettings
from fedmitr_flwr.training.augment import augment
from fedmitr_flwr.training.optimizer import make_optimizer


@dataclass(frozen=True)
class LocalResult:
    """Numbers that a client reports with its weights.

    Attributes
    ----------
    loss, accuracy
        Training loss in nats and accuracy in 0..1: means over the steps of the last epoch, on augmented images.
    num_examples
        Number of local training images.
    histogram
        Number of training images in each of the C classes.
    """

    loss: float
    accuracy: float
    num_examples: int
    histogram: tuple[int, ...]


def train_local(
    model: VisionTransformer,
    images: ImageSet,
    spec: ImageSpec,
    settings: TrainSettings,
    *,
    seed: int,
    device: torch.device,
) -> LocalResult:
    """Train a ViT in place on a client's images.

    Parameters
    ----------
    model
        A timm ViT that `vit.check_supported` accepts, holding the common initialisation.
    images
        The client's training images, at least one.
    spec
        Classes and normalisation.
    settings
        Epochs, optimiser, schedule, augmentation, loss.
    seed
        Seed of the order, the augmentation and dropout; on a CPU the same seed gives the same weights.
    device
        Device to train on; the model stays there.

    Raises
    ------
    ValueError
        If there are no images, or the loss is not finite; the message names the step.
    """
    if len(images) == 0:
        raise ValueError("local training needs at least one image, this client has none")
    histogram = images.histogram(spec.num_classes)
    targets, prior = class_targets(torch.from_numpy(histogram), settings)
    targets, prior = targets.to(device), prior.to(device)
    model.to(device).train()
    steps = total_steps(len(images), settings)
    optimizer, scheduler = make_optimizer(model, settings, steps)
    order = torch.Generator().manual_seed(seed)
    batch = min(settings.batch_size, len(images))
    per_epoch = math.ceil(len(images) / batch)
    labels = torch.from_numpy(images.labels)
    recent: list[Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        queue = torch.empty(0, dtype=torch.int64)
        for step in range(steps):
            if len(queue) < batch:
                queue = torch.cat([queue, torch.randperm(len(images), generator=order)])
            chosen, queue = queue[:batch], queue[batch:]
            x = augment(spec.normalise(images.images(chosen)), settings.augment, order).to(device)
            y = labels[chosen].to(device)
            logits = forward_images(model, x).logits
            loss = nn.functional.cross_entropy(logits + prior, targets[y])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step >= steps - per_epoch:
                recent.append(torch.stack([loss.detach(), (logits.argmax(1) == y).float().mean()]))
            if step % 50 == 49 and not math.isfinite(loss.item()):
                raise ValueError(f"training loss is {loss.item()} at step {step + 1}; lower train.learning-rate")
    model.eval()
    final_loss, accuracy = torch.stack(recent).mean(0).tolist() if recent else (0.0, 0.0)
    if not math.isfinite(final_loss):
        raise ValueError(f"training loss is {final_loss} at the end; lower train.learning-rate")
    return LocalResult(final_loss, accuracy, len(images), tuple(int(n) for n in histogram))


def total_steps(num_images: int, settings: TrainSettings) -> int:
    """Return the optimiser steps of a client: those of its epochs, within train.min-steps and train.max-steps."""
    epochs = settings.epochs * math.ceil(num_images / min(settings.batch_size, num_images))
    return min(max(epochs, settings.min_steps), settings.max_steps)


def class_targets(histogram: Tensor, settings: TrainSettings) -> tuple[Tensor, Tensor]:
    """Return the target distribution of each class and the log prior that is added to the logits.

    Balanced softmax (Ren et al., NeurIPS 2020, eq. 4) adds ``log n_c`` to the logit of class c in training, so that the
    logits without it are free of the client's label skew. A class that the client does not have gets no probability,
    and therefore no gradient. Label smoothing spreads over the client's classes alone; over all classes it would raise
    the logits of the absent ones.

    Returns
    -------
    targets
        ``(C, C)`` float; row c is the target of an image of class c.
    prior
        ``(C,)`` float; zeros without balanced softmax.
    """
    present = (histogram > 0).float()
    smooth = present / present.sum() if settings.balanced_softmax else torch.full_like(present, 1 / len(present))
    targets = (1 - settings.label_smoothing) * torch.eye(len(present)) + settings.label_smoothing * smooth
    absent = torch.full_like(present, -1e4)
    prior = torch.where(histogram > 0, histogram.float().clamp_min(1).log(), absent)
    return targets, prior if settings.balanced_softmax else torch.zeros_like(prior)
