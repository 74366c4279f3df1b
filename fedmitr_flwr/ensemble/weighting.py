"""Class-wise ensemble weights w_k(c), from the numbers that clients report or from the uploads alone.

Letters: K teachers, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Knowledge:
    """Inputs of the weightings: what the server knows about K clients.

    Attributes
    ----------
    num_examples
        ``(K,)`` number of training images of each client.
    histograms
        ``(K, C)`` number of training images of each class; None if any client did not share its histogram.
    head_updates
        ``(K, C, D)`` classifier weights minus those of the common initialisation.
    """

    num_examples: Tensor
    histograms: Tensor | None
    head_updates: Tensor


def evidence(weighting: str, knowledge: Knowledge) -> Tensor:
    """Return ``(K, C)`` evidence for how well each client knows each class, by the chosen weighting.

    Raises
    ------
    ValueError
        If the weighting needs histograms and `knowledge` has none.
    """
    return WEIGHTINGS[weighting](knowledge)


def uniform(knowledge: Knowledge) -> Tensor:
    """Return 1 for every client and class, ``(K, C)``."""
    return torch.ones(knowledge.head_updates.shape[:2])


def examples(knowledge: Knowledge) -> Tensor:
    """Return each client's number of images, the same for all classes, ``(K, C)``."""
    return knowledge.num_examples[:, None].expand(knowledge.head_updates.shape[:2])


def histogram(knowledge: Knowledge) -> Tensor:
    """Return each client's number of images of each class, ``(K, C)``."""
    if knowledge.histograms is None:
        raise ValueError('ensemble.weighting = "histogram" needs the label histogram of every client')
    return knowledge.histograms


def competence_of_head(knowledge: Knowledge) -> Tensor:
    """Return each client's estimated number of images of each class, ``(K, C)``; see `competence`."""
    return competence(knowledge.head_updates, knowledge.num_examples)


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


WEIGHTINGS: dict[str, Callable[[Knowledge], Tensor]] = {
    "uniform": uniform,
    "examples": examples,
    "histogram": histogram,
    "competence": competence_of_head,
}
"""The functions by `ensemble.weighting`, in the order of `settings.choices.Weighting`; they return values >= 0."""
