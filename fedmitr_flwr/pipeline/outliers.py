"""Teachers that contradict the others, or whose weights no training leads to, are heard less (ours; off by default).

Two kinds of evidence, of which the worse counts:

- **What they say.** Each teacher is inverted alone, into images of classes that it claims to know; random images join
  them. For each class, every teacher ranks all images by how much they look like it. A teacher's ranking is compared
  with that of the others who know the class, weighted by how much they know of it and by how far they are trusted
  themselves. Trust and comparison are repeated, so that of two who disagree the one whom others support elsewhere keeps
  its say. One class shared with one other is enough to be judged; who shares none is not judged.
- **Where their weights lie.** Training from a common start moves honest clients about equally far, and partly into the
  same direction.

A teacher is compared with the typical one, not with a fixed bar: what clients see differs from run to run.

What it can't see: an attacker that is right on synthetic images and wrong on real ones, and a majority of attackers
that agree with each other.

Letters: K teachers, C classes, B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.ensemble.engine.graphs import Graphs
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.ensemble.trust import known_classes, trust_by_opinion, trust_by_weights
from fedmitr_flwr.models.patch_grid import PatchGrid
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.settings.seeds import batch_seed
from fedmitr_flwr.stages.inversion.batch import InversionTask
from fedmitr_flwr.stages.inversion.sparse import invert
from fedmitr_flwr.stages.random_images.families import random_images

MOST_CLASSES = 6
IMAGES_PER_CLASS = 4
RANDOM_IMAGES = 256
# Inverted images of all teachers together, about: everybody's opinion of every image is in memory at once.
MOST_IMAGES = 1024
# Less trust than this is none: a small weight would still move the average of the weights.
LEAST_TRUST = 0.1


def trust(
    evidence: Tensor,
    teachers: Sequence[VisionTransformer],
    initial: Mapping[str, Tensor],
    grid: PatchGrid,
    settings: Settings,
    observer: Observer,
) -> Tensor:
    """How far each teacher should be heard, by `ensemble.outlier-guard`.

    Parameters
    ----------
    evidence
        ``(K, C)`` as `weighting.evidence` returns it.
    teachers
        K frozen ViTs on one device.
    initial
        State dict of the common initialisation.
    grid, settings
        Geometry; inversion, random images, seed and the guard.
    observer
        Hears whose say is lowered.

    Returns
    -------
    Tensor
        ``(K,)`` fp64 on the CPU in 0..1; 1 for one that gives no reason for doubt, or cannot be judged.
    """
    guard = settings.ensemble.outlier_guard
    agreement, said = trust_by_opinion(opinions(teachers, evidence, grid, settings), evidence, guard)
    found = torch.minimum(said, trust_by_weights(teachers, initial, guard))
    found = torch.where(found < LEAST_TRUST, 0.0, found)
    lowered = ", ".join(f"{k} to {found[k]:.2f}" for k in (found < 1).nonzero().squeeze(1).tolist())
    observer.event("ensemble", judged=int(agreement.isfinite().sum()), outliers=lowered or "none")
    return found


def opinions(
    teachers: Sequence[VisionTransformer], evidence: Tensor, grid: PatchGrid, settings: Settings
) -> Tensor:  # fmt: skip
    """Let all teachers look at images that each of them was inverted into, and at random ones.

    Returns
    -------
    Tensor
        ``(K, B, C)`` fp64 on the CPU: how much each image looks like each class to each teacher, with zero mean and
        unit variance over the images.
    """
    K, C = evidence.shape
    device = next(teachers[0].parameters()).device
    knows, graphs = known_classes(evidence), Graphs()
    images = []
    for k, teacher in enumerate(teachers):
        classes = evidence[k].argsort(descending=True)[:MOST_CLASSES]
        labels = classes[knows[k, classes]].repeat(IMAGES_PER_CLASS)[: max(2, MOST_IMAGES // K)].to(device)
        if len(labels):
            alone = Ensemble([teacher], torch.ones(1, C, device=device), graphs=graphs)
            generator = torch.Generator().manual_seed(batch_seed(settings.run.seed, k))
            task = InversionTask(alone, grid, settings.inversion)
            images.append(invert(task, labels, generator=generator).images)
    generator = torch.Generator().manual_seed(settings.run.seed)
    images.append(random_images(settings.distill.noise_kind, RANDOM_IMAGES, grid, generator).to(device))
    everybody = Ensemble(teachers, torch.full((K, C), 1 / K, device=device))
    logits = everybody.see(grid.to_patches(torch.cat(images))).logits
    said = logits.double().log_softmax(-1).cpu()
    said = said - said.mean(1, keepdim=True)
    return said / said.std(1, keepdim=True).clamp_min(1e-9)
