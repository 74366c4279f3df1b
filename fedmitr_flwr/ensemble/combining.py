"""Rules by which the outputs of the teachers become one distribution, `ensemble.combine`.

Each rule returns logarithms beside the probabilities. A rule whose probabilities can be too small for fp32 computes the
logarithms first, so that the loss ``-log A_y`` has a gradient in any case.

Letters: B images, K teachers, C classes; z_k logits of teacher k, w_k its class-wise weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

LEAST = 1e-12
"""Lower bound on the probabilities of the rule `probabilities` in logarithms."""


class Combined(NamedTuple):
    """One distribution for each image.

    Attributes
    ----------
    probabilities
        ``(B, C)``; rows sum to one.
    logs
        ``(B, C)`` their logarithms, finite.
    """

    probabilities: Tensor
    logs: Tensor


def of_probabilities(logits: Tensor, weights: Tensor) -> Combined:
    """Return ``sum_k w_k softmax(z_k)``, normalised over the classes.

    Parameters
    ----------
    logits
        ``(K, B, C)``; gradients flow to them.
    weights
        ``(K, C)`` non-negative, each column sums to one.
    """
    total = (weights[:, None] * logits.softmax(-1)).sum(0)
    probabilities = total / total.sum(-1, keepdim=True).clamp_min(1e-30)
    return Combined(probabilities, probabilities.clamp_min(LEAST).log())


def of_logits(logits: Tensor, weights: Tensor) -> Combined:
    """Return ``softmax(sum_k w_k z_k)``, as Co-Boosting combines teachers; see `of_probabilities`."""
    return of_logs((weights[:, None] * logits).sum(0))


def of_sigmoids(logits: Tensor, weights: Tensor) -> Combined:
    """Return ``sum_k w_k sigmoid(z_k)``, normalised over the classes; see `of_probabilities`."""
    return of_logs((weights.clamp_min(1e-30).log()[:, None] + F.logsigmoid(logits)).logsumexp(0))


def of_logs(values: Tensor) -> Combined:
    """Return the distribution whose logarithms are ``(B, C)`` values, up to a constant for each image."""
    logs = values.log_softmax(-1)
    return Combined(logs.exp(), logs)


COMBINATIONS: dict[str, Callable[[Tensor, Tensor], Combined]] = {
    "probabilities": of_probabilities,
    "logits": of_logits,
    "sigmoids": of_sigmoids,
}
"""The rules by `ensemble.combine`, in the order of `settings.choices.Combination`."""
