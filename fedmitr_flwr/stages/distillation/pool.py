"""What the student learns from: synthetic images and further ones, labelled by the ensemble.

Three kinds of further images join the pool for the first term of the loss: augmented views of the synthetic images
(which keep y), images mixed from the patches of two, and random images. They are ours and off at ``views = 1``,
``mix = 0``, ``noise = 0``. The ensemble labels the whole pool once: K teachers cost more than the student, and the
student passes over the pool several times.

Letters: B images, K teachers, C classes, D embedding, P patches of the full grid, N images of the pool.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import DistillSettings
from fedmitr_flwr.stages.density import PatchSplit
from fedmitr_flwr.stages.distillation.teacher_heads import last_norms
from fedmitr_flwr.stages.random_images import random_images
from fedmitr_flwr.stages.relabel import LowTargets
from fedmitr_flwr.stages.synthetic import SyntheticImages
from fedmitr_flwr.training.augment import augment


@dataclass(frozen=True)
class Targets:
    """What the student is to make of full images.

    Attributes
    ----------
    probabilities
        ``(N, C)`` A(x) of each, or its most probable class.
    features
        ``(N, K, D)`` bf16, each teacher's [CLS] token as its head sees it; None where no term of the loss reads them.
    """

    probabilities: Tensor
    features: Tensor | None

    @staticmethod
    def join(parts: Sequence[Targets]) -> Targets:
        """Those of all images of `parts`."""
        features = [part.features for part in parts if part.features is not None]
        probabilities = torch.cat([part.probabilities for part in parts])
        return Targets(probabilities, torch.cat(features) if features else None)

    def __getitem__(self, rows: slice) -> Targets:
        return Targets(self.probabilities[rows], None if self.features is None else self.features[rows])


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
        Of each full image.
    split
        Density split of the first B.
    low_targets
        q_low of the first B.
    """

    patches: Tensor
    labels: Tensor
    targets: Targets
    split: PatchSplit
    low_targets: LowTargets

    def join(self, other: Pool) -> Pool:
        """Both pools as one: the synthetic images of both as they were inverted, then what else both hold."""
        pools = (self, other)

        def parts(name: Literal["patches", "labels", "targets"]) -> list[Any]:
            still = [getattr(pool, name)[: len(pool.split.high)] for pool in pools]
            return [*still, *(getattr(pool, name)[len(pool.split.high) :] for pool in pools)]

        split = PatchSplit(torch.cat([pool.split.high for pool in pools]))
        low = LowTargets(
            torch.cat([pool.low_targets.probabilities for pool in pools]),
            torch.cat([pool.low_targets.present for pool in pools]),
        )
        targets = Targets.join(parts("targets"))
        return Pool(torch.cat(parts("patches")), torch.cat(parts("labels")), targets, split, low)


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


def unnamed_pool(patches: Tensor, targets: Targets) -> Pool:
    """A pool of ``(N, P, E)`` images that have targets and neither pseudo-labels nor a density split."""
    none = patches.new_zeros(0, patches.shape[1], dtype=torch.bool)
    low = LowTargets(targets.probabilities[:0], none.new_zeros(0))
    labels = torch.full((len(patches),), -1, device=patches.device)
    return Pool(patches, labels, targets, PatchSplit(none), low)


@torch.no_grad()
def label_patches(ensemble: Ensemble, patches: Tensor, settings: DistillSettings, batch_size: int = 128) -> Targets:
    """Targets of full images, ``(N, P, E)`` fp32 patches, as far as the loss of `settings` reads them."""
    teachers = ensemble.teachers if settings.learns_teachers else ()
    norms = [copy.deepcopy(last_norms(teacher)).float() for teacher in teachers]
    probabilities, features = [], []
    for part in patches.split(batch_size):
        seen = ensemble.see(part, features=bool(norms))
        probabilities.append(ensemble.combine(seen.logits))
        if seen.features is not None:
            tokens = [norm(of_one) for norm, of_one in zip(norms, seen.features, strict=True)]
            features.append(torch.stack(tokens, 1).bfloat16())
    targets = torch.cat(probabilities)
    if settings.labels == "hard":
        targets = F.one_hot(targets.argmax(1), targets.shape[1]).to(targets)
    return Targets(targets, torch.cat(features) if features else None)


def mix_patches(images: Tensor, count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """`count` images that take each patch from one of two images, in random proportion; ``(count, ch, S, S)``."""
    first, second = torch.randint(len(images), (2, count), generator=generator).to(images.device)
    share = torch.rand(count, 1, generator=generator)
    mask = (torch.rand(count, grid.num_patches, generator=generator) < share).to(images.device)
    return grid.to_images(torch.where(mask[..., None], grid.to_patches(images[first]), grid.to_patches(images[second])))
