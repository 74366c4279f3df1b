"""The pool of images on which the student is trained, labelled by the ensemble.

The pool holds the synthetic images and three kinds of further images: augmented views of the synthetic images, which
keep the pseudo-label y; images that mix the patches of two synthetic images; and random images. The further images are
not in the FedMITR paper; ``views = 1``, ``mix = 0`` and ``noise = 0`` turn them off. They have targets for
KL(A(x) || s(x)), but no density split. The ensemble labels the whole pool once, because a forward pass of K teachers
costs more than one of the student, and the student passes over the pool several times. If blocks of the student are
frozen, the pool also keeps their output for each image (`frozen.py`).

Letters: B images, K teachers, C classes, D embedding, P patches of the full grid, E pixels of a patch, N images of the
pool.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.settings import DistillSettings
from fedmitr_flwr.stages.density import PatchSplit
from fedmitr_flwr.stages.distillation.frozen import PartTokens, StudentTrunk, uses_high
from fedmitr_flwr.stages.distillation.teacher_heads import last_norms
from fedmitr_flwr.stages.random_images.families import random_images
from fedmitr_flwr.stages.relabel import LowTargets, RelabelledImages
from fedmitr_flwr.training.augment import augment


@dataclass(frozen=True)
class Targets:
    """Targets of full images, and the output of the student's frozen blocks for them.

    Attributes
    ----------
    probabilities
        ``(N, C)`` A(x) of each image, or its most probable class as a one-hot row.
    features
        ``(N, K, D)`` bf16, each teacher's [CLS] token as its head receives it; None if no loss term needs them.
    tokens
        Output of the student's frozen blocks, ``(N, tokens, D)`` fp32 or bf16; None if it is not kept.
    blocks
        Number of these blocks; 0 without `tokens`.
    """

    probabilities: Tensor
    features: Tensor | None
    tokens: Tensor | None = None
    blocks: int = 0

    @staticmethod
    def join(parts: Sequence[Targets]) -> Targets:
        """Concatenate the targets of all images of `parts`."""
        features = [part.features for part in parts if part.features is not None]
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return Targets(
            torch.cat([part.probabilities for part in parts]),
            torch.cat(features) if features else None,
            torch.cat(tokens) if tokens else None,
            parts[0].blocks,
        )

    def __getitem__(self, rows: slice | Tensor) -> Targets:
        features, tokens = (None if each is None else each[rows] for each in (self.features, self.tokens))
        return Targets(self.probabilities[rows], features, tokens, self.blocks)


@dataclass(frozen=True)
class LabelledImages:
    """Full images with their labels from the ensemble.

    Attributes
    ----------
    patches
        ``(N, P, E)`` images, cut into patches.
    labels
        ``(N,)`` int64 pseudo-labels y; -1 for images without one (mixed and random images).
    targets
        Targets of the same images.
    """

    patches: Tensor
    labels: Tensor
    targets: Targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> LabelledImages:
        return LabelledImages(self.patches[rows], self.labels[rows], self.targets[rows])

    @staticmethod
    def join(parts: Sequence[LabelledImages]) -> LabelledImages:
        """Concatenate the images of all `parts`."""
        return LabelledImages(
            torch.cat([part.patches for part in parts]),
            torch.cat([part.labels for part in parts]),
            Targets.join([part.targets for part in parts]),
        )


@dataclass(frozen=True)
class PoolBatch:
    """The images of one step of distillation.

    Attributes
    ----------
    images
        All b images of the step.
    inverted
        ``(m,)`` int64 positions of the unchanged synthetic images among them; only these have a density split.
    split, low_targets
        Density split and q_low of these m images.
    high_tokens, low_tokens
        As in `Pool`, for these m images.
    """

    images: LabelledImages
    inverted: Tensor
    split: PatchSplit
    low_targets: LowTargets
    high_tokens: PartTokens | None = None
    low_tokens: PartTokens | None = None


@dataclass(frozen=True)
class Pool:
    """All images on which the student is trained, on one device.

    Attributes
    ----------
    inverted
        The B unchanged synthetic images.
    split, low_targets
        Density split and q_low of the same B images.
    further
        Augmented views, mixed images and random images.
    high_tokens, low_tokens
        Output of the student's frozen blocks for the high- and for the low-density patches of the B synthetic images;
        None if it is not kept or no loss term needs it.
    """

    inverted: LabelledImages
    split: PatchSplit
    low_targets: LowTargets
    further: LabelledImages
    high_tokens: PartTokens | None = None
    low_tokens: PartTokens | None = None

    def __post_init__(self) -> None:
        counts = {len(self.inverted), len(self.split.high), len(self.low_targets.present)}
        if len(counts) > 1:
            raise ValueError(
                "a pool needs as many density splits and low-density targets as inverted images, "
                f"but their numbers are {sorted(counts)}"
            )

    def __len__(self) -> int:
        return len(self.inverted) + len(self.further)

    @property
    def device(self) -> torch.device:
        """Device of the images."""
        return self.further.labels.device

    def batch(self, rows: Tensor) -> PoolBatch:
        """Return the images of one step.

        Parameters
        ----------
        rows
            ``(b,)`` int64 numbers of images, on the CPU: 0 to B - 1 are the inverted images, B to N - 1 the further
            ones.
        """
        B = len(self.inverted)
        places, others = (rows < B).nonzero().squeeze(1), (rows >= B).nonzero().squeeze(1)
        inverted, further = rows[places].to(self.device), rows[others].to(self.device) - B
        order = torch.cat([places, others]).argsort().to(self.device)
        images = LabelledImages.join([self.inverted[inverted], self.further[further]])[order]
        high, low = (None if part is None else part[inverted] for part in (self.high_tokens, self.low_tokens))
        return PoolBatch(images, places.to(self.device), self.split[inverted], self.low_targets[inverted], high, low)

    def features(self) -> tuple[Tensor, ...] | None:
        """Return the teachers' tokens of all images as parts ``(n, K, D)``; None if no loss term needs them."""
        parts = [part.targets.features for part in (self.inverted, self.further)]
        found = tuple(part for part in parts if part is not None)
        return found or None

    def join(self, other: Pool) -> Pool:
        """Return one pool with the images of both."""
        return Pool(
            LabelledImages.join([self.inverted, other.inverted]),
            PatchSplit(torch.cat([self.split.high, other.split.high])),
            LowTargets.join([self.low_targets, other.low_targets]),
            LabelledImages.join([self.further, other.further]),
            _joined(self.high_tokens, other.high_tokens),
            _joined(self.low_tokens, other.low_tokens),
        )


def _joined(one: PartTokens | None, other: PartTokens | None) -> PartTokens | None:
    return None if one is None or other is None else PartTokens.join([one, other])


@torch.no_grad()
def make_pool(
    ensemble: Ensemble,
    made: RelabelledImages,
    grid: PatchGrid,
    settings: DistillSettings,
    *,
    generator: torch.Generator,
    batch_size: int = 128,
    trunk: StudentTrunk | None = None,
) -> Pool:
    """Add further images to the synthetic ones and label all of them by the ensemble.

    Parameters
    ----------
    ensemble
        The weighted teachers.
    made
        Result of stages 1 to 3.
    grid
        Geometry and valid pixel range of the images.
    settings
        Numbers and kinds of further images. Mixed and random images are left out if ``kl_weight`` is 0, because they
        have no pseudo-label.
    generator
        CPU generator of augmentation, mixing and random images.
    batch_size
        Number of images in a forward pass of the ensemble.
    trunk
        Frozen blocks of the student whose output the pool keeps; None: it keeps none.
    """
    synthetic = made.synthetic
    patches, labels = gather(synthetic.images, synthetic.labels, grid, settings, generator)
    everything = LabelledImages(patches, labels, label_patches(ensemble, patches, settings, batch_size, trunk))
    B, high, low = len(synthetic.labels), None, None
    if trunk is not None and uses_high(settings):
        high = PartTokens.of_patches(trunk, patches[:B], made.split.high, batch_size)
    if trunk is not None and settings.low_weight > 0:
        low = PartTokens.of_patches(trunk, patches[:B], made.split.low & made.low_targets.present[:, None], batch_size)
    return Pool(everything[:B], made.split, made.low_targets, everything[B:], high, low)


def gather(
    images: Tensor, labels: Tensor, grid: PatchGrid, settings: DistillSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Add augmented views, mixed images and random images to ``(B, ch, S, S)`` images.

    Returns
    -------
    patches
        ``(N, P, E)``; the first B are `images`.
    labels
        ``(N,)`` int64; -1 for images without a label.
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
    """Return a pool of ``(N, P, E)`` images that have targets, but no pseudo-labels and no density split."""
    labels = torch.full((len(patches),), -1, device=patches.device)
    everything = LabelledImages(patches, labels, targets)
    none = patches.new_zeros(0, patches.shape[1], dtype=torch.bool)
    low = LowTargets(targets.probabilities[:0], none.new_zeros(0))
    return Pool(everything[:0], PatchSplit(none), low, everything)


@torch.no_grad()
def label_patches(
    ensemble: Ensemble,
    patches: Tensor,
    settings: DistillSettings,
    batch_size: int = 128,
    trunk: StudentTrunk | None = None,
) -> Targets:
    """Compute the targets of full images that the loss terms of `settings` need.

    Parameters
    ----------
    ensemble
        The weighted teachers.
    patches
        ``(N, P, E)`` fp32.
    batch_size
        Number of images in a forward pass of the ensemble.
    trunk
        Frozen blocks of the student whose output is kept. If the teachers share them, they run once for teachers and
        student. None: nothing is kept.
    """
    teachers = ensemble.teachers if settings.learns_teachers else ()
    norms = [copy.deepcopy(last_norms(teacher)).float() for teacher in teachers]
    probabilities, features = [], []
    kept: Tensor | None = None
    for first in range(0, max(1, len(patches)), batch_size):
        part = patches[first : first + batch_size]
        seen = ensemble.see(part, features=bool(norms), tokens=trunk is not None and trunk.shared)
        probabilities.append(ensemble.combine(seen.logits))
        if seen.features is not None:
            of_each = [norm(of_one) for norm, of_one in zip(norms, seen.features, strict=True)]
            features.append(torch.stack(of_each, 1).bfloat16())
        if trunk is not None:
            tokens = trunk(part) if seen.tokens is None else seen.tokens
            if kept is None:
                kept = tokens.new_empty(len(patches), *tokens.shape[1:], dtype=trunk.dtype)
            kept[first : first + batch_size] = tokens
    targets = torch.cat(probabilities)
    if settings.labels == "hard":
        targets = F.one_hot(targets.argmax(1), targets.shape[1]).to(targets)
    return Targets(targets, torch.cat(features) if features else None, kept, trunk.blocks if trunk else 0)


def mix_patches(images: Tensor, count: int, grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Mix pairs of images patch by patch, in random proportions; ``(count, ch, S, S)``.

    Each of the `count` images takes each patch from one of two images, which are drawn with replacement.
    """
    first, second = torch.randint(len(images), (2, count), generator=generator).to(images.device)
    share = torch.rand(count, 1, generator=generator)
    mask = (torch.rand(count, grid.num_patches, generator=generator) < share).to(images.device)
    return grid.to_images(torch.where(mask[..., None], grid.to_patches(images[first]), grid.to_patches(images[second])))
