"""Teachers that contradict all others on synthetic images lose their say (ours; off by default).

Each teacher is inverted alone, into images of classes that it claims to know, and all others say what these show.
Clients see different classes, so that honest teachers disagree outside their own: a teacher is judged, and judges, only
by classes that its evidence says it knows, and by others that know them too. One that does not share two classes with
two others is not judged at all: nobody can contradict it.

What it can't see: an attacker that is right on synthetic images and wrong on real ones, and a majority of attackers
that agree with each other.

Letters: K teachers, C classes, B images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr.ensemble import Ensemble
from fedmitr_flwr.grid import PatchGrid
from fedmitr_flwr.inversion import invert
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.settings import InversionSettings, Settings

# Share of a client's examples from which on it knows a class; for how many of these, and how often, it is inverted.
KNOWN_SHARE = 0.05
MOST_CLASSES = 6
IMAGES_PER_CLASS = 4
# Of all teachers together, about: everybody's opinion of every image is in memory at once.
MOST_IMAGES = 1024
# Fewer others than these can't outvote a teacher: which of two that disagree is wrong can't be told.
LEAST_PEERS = 2


def without_outliers(
    evidence: Tensor,
    teachers: Sequence[VisionTransformer],
    grid: PatchGrid,
    settings: Settings,
    observer: Observer,
) -> Tensor:
    """Return the ``(K, C)`` evidence, zero for teachers that contradict the others by `ensemble.outlier-guard`."""
    agreement = examine(teachers, evidence, grid, settings.inversion, seed=settings.run.seed)
    out = outliers(agreement, settings.ensemble.outlier_guard)
    found = ", ".join(str(number) for number in out.nonzero().squeeze(1).tolist())
    judged = int(standing(agreement).isfinite().sum())
    observer.event("ensemble", judged=judged, outliers=found or "none")
    return evidence * ~out[:, None]


def known_classes(evidence: Tensor) -> Tensor:
    """Which classes each teacher knows: ``(K, C)`` bool from ``(K, C)`` evidence, in examples or in any other unit."""
    return evidence > KNOWN_SHARE * evidence.sum(1, keepdim=True)


def examine(
    teachers: Sequence[VisionTransformer],
    evidence: Tensor,
    grid: PatchGrid,
    settings: InversionSettings,
    *,
    seed: int,
) -> Tensor:
    """Compare what all teachers say of images that each of them was inverted into.

    Parameters
    ----------
    teachers
        K frozen ViTs on one device.
    evidence
        ``(K, C)`` as `weighting.evidence` returns it.
    grid, settings
        Geometry and inversion.
    seed
        Of the images.

    Returns
    -------
    Tensor
        ``(K, K)`` fp64 on the CPU, symmetric: the correlation of what two teachers say of all images about the classes
        that both know. NaN where these are fewer than two, and on the diagonal.
    """
    K, C = evidence.shape
    device = next(teachers[0].parameters()).device
    knows = known_classes(evidence).to(device)
    images = []
    for k, teacher in enumerate(teachers):
        classes = evidence[k].argsort(descending=True)[:MOST_CLASSES].to(device)
        labels = classes[knows[k, classes]].repeat(IMAGES_PER_CLASS)[: max(2, MOST_IMAGES // K)]
        alone = Ensemble([teacher], torch.ones(1, C, device=device))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + k)
        images.append(invert(alone, labels, grid, settings, generator=generator).images)
    everybody = Ensemble(teachers, torch.full((K, C), 1 / K, device=device))
    logits, _ = everybody.see(grid.to_patches(torch.cat(images)))
    said = logits.double().log_softmax(-1)
    agreement = torch.full((K, K), torch.nan, dtype=torch.float64)
    for one in range(K):
        for other in range(one):
            common = knows[one] & knows[other]
            if int(common.sum()) > 1:
                found = _correlation(said[one][:, common], said[other][:, common])
                agreement[one, other] = agreement[other, one] = found
    return agreement


def _correlation(one: Tensor, other: Tensor) -> float:
    """Correlation of two ``(B, C')`` tables, each without its means over images and over classes.

    How sure a teacher is of an image, and how much it likes a class, is its own affair: only what it says of this class
    in this image, compared with others, can be contradicted.
    """
    tables = [table - table.mean(1, keepdim=True) for table in (one, other)]
    first, second = (table - table.mean(0) for table in tables)
    return float((first * second).sum() / (first.norm() * second.norm()).clamp_min(1e-30))


def standing(agreement: Tensor) -> Tensor:
    """What its peers think of each teacher: ``(K,)``, the median of its agreements; NaN for one with too few peers.

    The median lets a minority of bad peers say nothing of a good teacher.
    """
    enough = agreement.isfinite().sum(1) >= LEAST_PEERS
    return torch.where(enough, agreement.nanmedian(1).values, torch.nan)


def outliers(agreement: Tensor, guard: float) -> Tensor:
    """Which teachers contradict the others.

    Parameters
    ----------
    agreement
        ``(K, K)`` of `examine`.
    guard
        Those whose standing is below this many times the median standing lose their say; 0 none.

    Returns
    -------
    Tensor
        ``(K,)`` bool; never more than half of those that could be judged.
    """
    own = standing(agreement)
    typical = own.nanmedian().clamp_min(0.0)
    return (own < guard * typical) & own.isfinite()
