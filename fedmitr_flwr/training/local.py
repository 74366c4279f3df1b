"""Local training of one client on its images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedmitr_flwr.data import ImageSet, ImageSpec
from fedmitr_flwr.models.lora import add_adapters, merge_adapters
from fedmitr_flwr.models.trainable import TrainedPart, freeze, trained_part
from fedmitr_flwr.models.vit import forward_tokens, leading_tokens
from fedmitr_flwr.settings import Augmentation, TrainSettings
from fedmitr_flwr.training.augment import augment
from fedmitr_flwr.training.optimizer import make_optimizer

CACHE_BYTES = 512 << 20
"""Largest size of the kept tokens of all images of a client, such as 1,300 images of a ViT-S/14 at 224 pixels."""


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
    adapters
        Trained adapters for `train.trainable = lora`, by the names of `models.trainable.adapter_names`; else empty.
    """

    loss: float
    accuracy: float
    num_examples: int
    histogram: tuple[int, ...]
    adapters: Mapping[str, Tensor] = field(default_factory=dict)


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
        What is trained, epochs, optimiser, schedule, augmentation, loss.
    seed
        Seed of the order, the augmentation and dropout; on a CPU the same seed gives the same weights.
    device
        Device to train on; the model stays there. The adapters of `train.trainable = lora` are added to its weights at
        the end.

    Raises
    ------
    SettingsError
        If `train.trainable` does not fit the model, or needs a package that is not installed.
    ValueError
        If there are no images, or the loss is not finite; the message names the step.
    """
    if len(images) == 0:
        raise ValueError("local training needs at least one image, this client has none")
    part = trained_part(settings, model.state_dict())
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapted = add_adapters(model.cpu(), part, seed) if part.adapted else None
    freeze(model.to(device), part)
    try:
        loss, accuracy, histogram = _train(model, part, images, spec, settings, seed, device)
    finally:
        adapters = {} if adapted is None else merge_adapters(model, adapted, part)
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
    return LocalResult(loss, accuracy, len(images), histogram, adapters)


def _train(
    model: VisionTransformer,
    part: TrainedPart,
    images: ImageSet,
    spec: ImageSpec,
    settings: TrainSettings,
    seed: int,
    device: torch.device,
) -> tuple[float, float, tuple[int, ...]]:
    """Run the optimiser; return loss and accuracy of the last epoch, and the histogram."""
    histogram = images.histogram(spec.num_classes)
    targets, prior = class_targets(torch.from_numpy(histogram), settings)
    targets, prior = targets.to(device), prior.to(device)
    steps = total_steps(len(images), settings)
    optimizer, scheduler = make_optimizer(model, settings, steps)
    order = torch.Generator().manual_seed(seed)
    batch = min(settings.batch_size, len(images))
    per_epoch = math.ceil(len(images) / batch)
    labels = torch.from_numpy(images.labels)
    recent: list[Tensor] = []
    trunk = Trunk(model, part.frozen_blocks, images, spec, settings.augment, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        queue = torch.empty(0, dtype=torch.int64)
        for step in range(steps):
            if len(queue) < batch:
                queue = torch.cat([queue, torch.randperm(len(images), generator=order)])
            chosen, queue = queue[:batch], queue[batch:]
            tokens = trunk(chosen, order)
            y = labels[chosen].to(device)
            logits = forward_tokens(model, tokens, part.frozen_blocks or 0).logits
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
    final_loss, accuracy = torch.stack(recent).mean(0).tolist() if recent else (0.0, 0.0)
    if not math.isfinite(final_loss):
        raise ValueError(f"training loss is {final_loss} at the end; lower train.learning-rate")
    return final_loss, accuracy, tuple(int(n) for n in histogram)


class Trunk:
    """The part of a model before its first trained block, for the images of a client.

    If it is frozen, it runs without autograd. Without augmentation its tokens are then the same in every epoch: they
    are computed once for each image if a block is frozen and all images need at most `CACHE_BYTES`.

    Parameters
    ----------
    model
        The model that is trained.
    frozen_blocks
        Number of leading blocks that are frozen together with the embedding; None: the embedding is trained.
    images, spec, augmentation, device
        Images of the client, their normalisation, `train.augment`, and the device of the model.
    """

    def __init__(
        self,
        model: VisionTransformer,
        frozen_blocks: int | None,
        images: ImageSet,
        spec: ImageSpec,
        augmentation: Augmentation,
        device: torch.device,
    ) -> None:
        self._model, self._frozen = model, frozen_blocks
        self._images, self._spec, self._augmentation, self._device = images, spec, augmentation, device
        self._known = torch.zeros(len(images), dtype=torch.bool)
        self._kept: Tensor | None = None

    def __call__(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Return the ``(B, N, D)`` tokens of the images at the positions `chosen`, ``(B,)``."""
        if self._frozen is None:
            return leading_tokens(self._model, self._pixels(chosen, generator), 0)
        with torch.no_grad():
            if self._augmentation != "none" or self._frozen == 0:
                return leading_tokens(self._model, self._pixels(chosen, generator), self._frozen)
            return self._remembered(chosen, generator, self._frozen)

    def _remembered(self, chosen: Tensor, generator: torch.Generator, blocks: int) -> Tensor:
        new = chosen[~self._known[chosen]]
        if len(new):
            tokens = leading_tokens(self._model, self._pixels(new, generator), blocks)
            if self._kept is None:
                if len(self._images) * tokens[0].numel() * tokens.element_size() > CACHE_BYTES:
                    return tokens
                self._kept = tokens.new_empty((len(self._images), *tokens.shape[1:]))
            self._kept[new.to(self._device)] = tokens
            self._known[new] = True
        assert self._kept is not None
        return self._kept[chosen.to(self._device)]

    def _pixels(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        images = self._spec.normalise(self._images.images(chosen))
        return augment(images, self._augmentation, generator).to(self._device)


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
