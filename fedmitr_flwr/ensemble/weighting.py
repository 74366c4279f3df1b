"""Class-wise ensemble weights w_k(c), from the numbers that clients report or from the uploads alone.

Letters: K teachers, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["uniform", "examples", "histogram", "competence"]


def class_weights(evidence: Tensor, power: float, trust: Tensor | None = None) -> Tensor:
    """Normalise evidence into ensemble weights.

    Parameters
    ----------
    evidence
        ``(K, C)`` non-negative, as `evidence` returns it.
    power
        Exponent on the evidence before the columns are normalised; 0 gives all clients with evidence above 0 for a
        class the same weight.
    trust
        ``(K,)`` in 0..1, not all 0: factor on each client's weight (`outliers.trust`); None: 1 for all.

    Returns
    -------
    Tensor
        ``(K, C)`` fp32, columns sum to one. In a class without any evidence the weights are proportional to trust.

    Raises
    ------
    ValueError
        If `evidence` has a negative or non-finite entry.
    """
    raw = evidence.double()
    if not bool(torch.isfinite(raw).all()) or bool((raw < 0).any()):
        raise ValueError("evidence for ensemble weights must be finite and at least 0 in every entry")
    raw = torch.where(raw > 0, raw.clamp_min(1e-30) ** power, torch.zeros_like(raw))
    heard = torch.ones(len(raw), 1).to(raw) if trust is None else trust.to(raw)[:, None]
    raw = raw * heard
    raw = torch.where(raw.sum(0) == 0, heard.expand_as(raw), raw)
    return (raw / raw.sum(0)).float()


def evidence(weighting: Weighting, num_examples: Tensor, histograms: Tensor | None, head_updates: Tensor) -> Tensor:
    """Return ``(K, C)`` evidence for how well each client knows each class.

    Parameters
    ----------
    weighting
        ``uniform``: 1 everywhere; ``examples``: the number of examples, for every class; ``histogram``: the number of
        examples of each class; ``competence``: that number as `competence` estimates it.
    num_examples
        ``(K,)``.
    histograms
        ``(K, C)`` examples of each class; None if any client did not share its histogram.
    head_updates
        ``(K, C, D)`` classifier weights minus those of the common initialisation.

    Raises
    ------
    ValueError
        If `weighting` is ``histogram`` and `histograms` is None.
    """
    K, C = head_updates.shape[:2]
    if weighting == "histogram":
        if histograms is None:
            raise ValueError('ensemble.weighting = "histogram" needs the label histogram of every client')
        return histograms
    if weighting == "competence":
        return competence(head_updates, num_examples)
    each = torch.ones(K) if weighting == "uniform" else num_examples
    return each[:, None].expand(K, C)


def competence(head_updates: Tensor, num_examples: Tensor) -> Tensor:
    """Estimate each client's class counts from how far each row of its classifier head moved.

    The head row of a frequent class moves away from the mean movement of all rows, and the norm of the row-centred
    update follows the logarithm of the class count (correlations: `benchmarks/results/accuracy-notes.md`). The estimate
    is ``expm1`` of the scaled norm; each client's counts are scaled to sum to its number of examples. This weighting is
    ours; the FedMITR paper weights by numbers that the clients report.

    Parameters
    ----------
    head_updates, num_examples
        As for `evidence`.

    Returns
    -------
    Tensor
        ``(K, C)`` estimated examples of each class, at least 0.
    """
    norms = (head_updates - head_updates.mean(1, keepdim=True)).norm(dim=-1).double()
    floor = norms.min(1, keepdim=True).values
    scale = (norms.max(1, keepdim=True).values - floor).clamp_min(1e-12)
    largest = num_examples.double().clamp_min(1.0).log1p()[:, None]
    counts = torch.expm1((norms - floor) / scale * largest)
    return counts / counts.sum(1, keepdim=True).clamp_min(1e-12) * num_examples.double()[:, None]
