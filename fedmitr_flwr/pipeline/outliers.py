"""Outlier guard: down-weight teachers whose outputs disagree with the others or whose updates look untrained.

The guard is ours, not the paper's, and is off by default (`ensemble.outlier-guard`). It computes two values of trust
for each teacher, and the lower one counts:

- **Outputs.** Each teacher is inverted alone into images of classes that it knows; random images are added. All
  teachers are evaluated on all images. For each class, the outputs of a teacher over the images are correlated with
  the weighted mean of the outputs of the other teachers that know the class. The weight of a teacher in this mean grows
  with its evidence for the class and with its own trust. Trust and correlation are computed in turn, so of two teachers
  that disagree, the one that agrees with others in other classes keeps its weight. One class shared with one other
  teacher is enough for a comparison. A teacher that shares no class is not compared.
- **Updates.** Training from a common initialisation moves honest clients about equally far and partly in the same
  direction.

Teachers are compared with the median of all teachers, not with a fixed threshold, because the data of the clients, and
with them the agreement, differ from run to run.

Not detected: an attacker whose outputs are right on synthetic images and wrong on real ones, and a majority of
attackers that agree with each other.

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

# Each teacher is inverted into at most this many classes, those for which it has the most evidence.
MOST_CLASSES = 6
IMAGES_PER_CLASS = 4
RANDOM_IMAGES = 256
# Approximate limit of inverted images of all teachers: the outputs of all teachers on all images are in memory at once.
MOST_IMAGES = 1024
# A trust below this is set to 0: even a teacher with a small weight would move the average of the weights.
LEAST_TRUST = 0.1


def trust(
    evidence: Tensor,
    teachers: Sequence[VisionTransformer],
    initial: Mapping[str, Tensor],
    grid: PatchGrid,
    settings: Settings,
    observer: Observer,
) -> Tensor:
    """Compute the trust in each teacher.

    Parameters
    ----------
    evidence
        ``(K, C)`` as `weighting.evidence` returns it.
    teachers
        K frozen ViTs on one device.
    initial
        State dict of the common initialisation.
    grid
        Geometry and valid pixel range of the images.
    settings
        All settings; those of inversion, random images, seed and the guard are used.
    observer
        Receives an event that names the teachers with a trust below 1.

    Returns
    -------
    Tensor
        ``(K,)`` fp64 on the CPU in 0..1: 1 leaves a teacher's weight unchanged, 0 removes the teacher.
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
    """Compute the outputs of all teachers on images inverted from each of them and on random images.

    Returns
    -------
    Tensor
        ``(K, B, C)`` fp64 on the CPU: log-probabilities, standardised to zero mean and unit variance over the images
        for each teacher and class.
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
