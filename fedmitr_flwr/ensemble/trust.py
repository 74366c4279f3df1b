"""Trust in each teacher from what the teachers say about the same images and from how far their weights moved.

Letters: K teachers, C classes, B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# Share of a client's examples from which on it knows a class; for how many of these, and how often, it is inverted.
KNOWN_SHARE = 0.05


# Trust settles in two or three.
ROUNDS = 5


# An update this many times as long as the median one is no training of the same recipe.
LONG_UPDATE = 3.0


def known_classes(evidence: Tensor) -> Tensor:
    """Which classes each teacher knows: ``(K, C)`` bool from ``(K, C)`` evidence, in examples or in any other unit."""
    return evidence > KNOWN_SHARE * evidence.sum(1, keepdim=True)


def trust_by_opinion(said: Tensor, evidence: Tensor, guard: float) -> tuple[Tensor, Tensor]:
    """Compare each teacher with the others, class by class.

    Parameters
    ----------
    said
        ``(K, B, C)`` of `opinions`.
    evidence
        ``(K, C)``.
    guard
        A teacher is heard less if the others agree with it less than this many times as much as with the typical one.

    Returns
    -------
    agreement
        ``(K,)`` correlation with the others' weighted opinion, mean over the classes by what the teacher knows of them;
        NaN for one that shares no class with a trusted one.
    trust
        ``(K,)`` in 0..1.
    """
    knows = known_classes(evidence)
    weights = evidence.double().clamp_min(0.0).sqrt() * knows
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
    trusted = torch.ones(len(said), dtype=torch.float64)
    agreement = torch.full_like(trusted, torch.nan)
    for _ in range(ROUNDS):
        heard = weights * trusted[:, None]
        everybody = torch.einsum("kc,kbc->bc", heard, said)
        others = everybody - heard[:, None] * said  # (K, B, C)
        counts = knows & (heard.sum(0) - heard > 1e-9)
        correlation = (said * others).sum(1) / (said.norm(dim=1) * others.norm(dim=1)).clamp_min(1e-30)
        share = weights * counts
        agreement = (share * correlation).sum(1) / share.sum(1)
        trusted = _lowered(agreement, guard)
    return agreement, trusted


def trust_by_weights(teachers: Sequence[VisionTransformer], initial: Mapping[str, Tensor], guard: float) -> Tensor:
    """Compare how far, and into which direction, each teacher's weights moved: ``(K,)`` in 0..1.

    The teachers are gone through twice, so that no more than two updates are in memory at a time.
    """
    lengths = torch.tensor([float(_update(teacher, initial).norm()) for teacher in teachers], dtype=torch.float64)
    lengths = lengths.clamp_min(1e-12)
    total: Tensor | float = 0.0
    for teacher, length in zip(teachers, lengths.tolist(), strict=True):
        total = total + _update(teacher, initial) / length
    cosines = []
    for teacher, length in zip(teachers, lengths.tolist(), strict=True):
        own = _update(teacher, initial) / length
        others = total - own
        cosines.append(float(own @ others / others.norm().clamp_min(1e-12)))
    direction = torch.tensor(cosines, dtype=torch.float64)
    if len(teachers) == 1:
        return torch.ones(1, dtype=torch.float64)
    short = (LONG_UPDATE * lengths.median() / lengths).clamp(max=1.0).square()
    return torch.minimum(short, _lowered(direction, guard))


def _update(teacher: VisionTransformer, initial: Mapping[str, Tensor]) -> Tensor:
    """All weights minus the common initialisation's, in one row on the CPU."""
    state = teacher.state_dict()
    parts = [state[name].cpu().float() - start for name, start in initial.items() if start.is_floating_point()]
    return torch.cat([part.flatten() for part in parts])


def _lowered(values: Tensor, guard: float) -> Tensor:
    """Trust from agreements: 1 from `guard` times the typical one on, falling with its square below; 1 for NaN.

    Where the typical one is not above 0, nobody can be told from anybody.
    """
    bar = guard * values.nanmedian()
    if not bool(bar > 0):
        return torch.ones_like(values)
    return torch.where(values < bar, (values / bar).clamp(0.0, 1.0).square(), 1.0)
