"""Trust in each teacher, from the agreement of outputs on the same images and from the size and direction of updates.

A trust of 1 leaves a teacher's weight in the ensemble unchanged; 0 removes the teacher.

Letters: K teachers, C classes, B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# A teacher knows a class if the class holds more than this share of its evidence.
KNOWN_SHARE = 0.05
# Trust and agreement are computed in turn this many times; they settle after two or three.
ROUNDS = 5
# Updates longer than this many times the median length are down-weighted: the same recipe does not produce them.
LONG_UPDATE = 3.0


def known_classes(evidence: Tensor) -> Tensor:
    """Return which classes each teacher knows, ``(K, C)`` bool, from ``(K, C)`` evidence in any unit."""
    return evidence > KNOWN_SHARE * evidence.sum(1, keepdim=True)


def trust_by_opinion(said: Tensor, evidence: Tensor, guard: float) -> tuple[Tensor, Tensor]:
    """Down-weight teachers whose outputs disagree with those of the others, class by class.

    Parameters
    ----------
    said
        ``(K, B, C)`` standardised outputs, as `outliers.opinions` returns them.
    evidence
        ``(K, C)`` as `weighting.evidence` returns it.
    guard
        A teacher is down-weighted when its agreement is below this fraction of the median agreement.

    Returns
    -------
    agreement
        ``(K,)`` correlation with the weighted mean of the other teachers' outputs, averaged over the classes that the
        teacher knows, weighted by the square root of its evidence. NaN for a teacher that shares no class with a
        trusted one.
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
    """Down-weight teachers whose update is much longer than the median or points away from the others' updates.

    The update is the teacher's weights minus the common initialisation. It is computed three times for each teacher,
    so that only a few updates are in memory at a time.

    Parameters
    ----------
    initial
        State dict of the common initialisation.
    guard
        A teacher is down-weighted when the cosine between its update and the sum of the others' normalised updates is
        below this fraction of the median cosine.

    Returns
    -------
    Tensor
        ``(K,)`` trust in 0..1; 1 for a single teacher.
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
    """Return the weights minus the common initialisation as one flat fp32 tensor on the CPU."""
    state = teacher.state_dict()
    parts = [state[name].cpu().float() - start for name, start in initial.items() if start.is_floating_point()]
    return torch.cat([part.flatten() for part in parts])


def _lowered(values: Tensor, guard: float) -> Tensor:
    """Turn agreements into trust: 1 from `guard` times the median on and for NaN, below it the squared ratio to that.

    If the median is not above 0, agreement does not separate the teachers, and every trust is 1.
    """
    bar = guard * values.nanmedian()
    if not bool(bar > 0):
        return torch.ones_like(values)
    return torch.where(values < bar, (values / bar).clamp(0.0, 1.0).square(), 1.0)
