"""Bounds on what one client can claim and change, taken from what the other clients claim and change.

An upload that passes validation can still be hostile. It may claim a thousand million images, or its update may be a
hundred times as long as an honest one. Either would decide averages and votes alone. The bounds here are relative to
the other clients, because honest numbers differ from run to run. They hold as long as most clients are honest.

Not limited: an attacker whose numbers and update lengths look honest. See `pipeline.outliers`.

Letters: K clients, C classes, L floating-point tensors of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedmitr_flwr.ensemble.trust import known_classes

CLAIM_QUANTILE = 0.7
CLAIM_FACTOR = 3.0
"""A claimed number of images counts at most this many times the quantile of the others' claims. With three attackers
among ten clients, the quantile is still that of honest claims."""

FEWEST = 3
"""Below this number of clients nobody can be compared with a majority, and nothing is bounded."""

TENSOR_FACTOR = 2.0
"""The limit of one tensor's update over that of the whole update: single tensors differ more between honest clients."""

State = Mapping[str, Tensor]


def bounded_counts(num_examples: Tensor) -> Tensor:
    """Limit each claimed number of images by the claims of the others.

    Parameters
    ----------
    num_examples
        ``(K,)`` as claimed.

    Returns
    -------
    Tensor
        ``(K,)`` fp64; at most `CLAIM_FACTOR` times the `CLAIM_QUANTILE` quantile of the other clients' claims.
    """
    counts = num_examples.double()
    if len(counts) < FEWEST:
        return counts
    others = _others(counts[:, None])[..., 0]  # (K, K - 1)
    limit = CLAIM_FACTOR * others.quantile(CLAIM_QUANTILE, dim=1, interpolation="lower")
    return torch.minimum(counts, limit)


def update_norms(states: Sequence[State], initial: State) -> Tensor:
    """Return the L2 norm of each tensor's update, ``(K, L)`` fp64, over the floating-point tensors in order.

    One tensor of one client is read at a time.
    """
    names = floating(initial)
    norms = [[float((state[name].float() - initial[name]).double().norm()) for name in names] for state in states]
    return torch.tensor(norms, dtype=torch.float64).reshape(len(states), len(names))


def update_scales(norms: Tensor, limit: float) -> Tensor:
    """Return the factors that bring all updates within the limits.

    First, each tensor's update is scaled to at most `TENSOR_FACTOR * limit` times the median of the other clients'
    updates of this tensor. Then the whole update is scaled to at most `limit` times the median length of theirs.

    Parameters
    ----------
    norms
        ``(K, L)`` of `update_norms`.
    limit
        Times the median; 0: no limit.

    Returns
    -------
    Tensor
        ``(K, L)`` fp64 in 0..1.
    """
    if limit == 0 or len(norms) < FEWEST:
        return torch.ones_like(norms)
    tensors = _ratio(TENSOR_FACTOR * limit * _others(norms).median(1).values, norms)
    lengths = norms.square().sum(1, keepdim=True).sqrt()
    scaled = (norms * tensors).square().sum(1, keepdim=True).sqrt()
    factors: Tensor = tensors * _ratio(limit * _others(lengths).median(1).values, scaled)
    return factors


class BoundedState(Mapping[str, Tensor]):
    """A client's weights with a shortened update, computed one tensor at a time when it is asked for.

    Parameters
    ----------
    state
        The client's weights.
    initial
        The common initialisation.
    scales
        ``(L,)`` factors of the updates of the floating-point tensors.
    """

    def __init__(self, state: State, initial: State, scales: Tensor) -> None:
        self._state, self._initial = state, initial
        self._scales = dict(zip(floating(initial), scales.tolist(), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        value, scale = self._state[name], self._scales.get(name, 1.0)
        if scale == 1.0:
            return value
        start = self._initial[name]
        bounded: Tensor = start + scale * (value.float() - start)
        return bounded

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def dominant(weights: Tensor, evidence: Tensor) -> dict[int, list[int]]:
    """Find clients that have more than half of the vote on a class that other clients know too.

    Parameters
    ----------
    weights, evidence
        ``(K, C)`` of the ensemble.

    Returns
    -------
    dict
        Client to classes.
    """
    shared = known_classes(evidence).sum(0) > 1
    found: dict[int, list[int]] = {}
    for k, c in ((weights > 0.5) & shared).nonzero().tolist():
        found.setdefault(k, []).append(c)
    return found


def floating(state: State) -> list[str]:
    """Return the names of the floating-point tensors."""
    return [name for name, value in state.items() if value.is_floating_point()]


def _others(values: Tensor) -> Tensor:
    """For each of K rows of ``(K, L)`` the K - 1 other rows, ``(K, K - 1, L)``."""
    K = len(values)
    places = torch.tensor([[j for j in range(K) if j != k] for k in range(K)])
    others: Tensor = values[places]
    return others


def _ratio(limit: Tensor, found: Tensor) -> Tensor:
    """Return the factor that brings `found` down to `limit`: at most 1."""
    return torch.where(found > limit, limit / found.clamp_min(1e-300), torch.ones_like(found))
