"""Combine the uploads into one set of weights without data: the possible starting weights of the student.

Letters: K teachers, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def fedavg(states: Sequence[State], num_examples: Tensor) -> dict[str, Tensor]:
    """Average the uploads weighted by number of examples: one-shot FedAvg (McMahan et al. 2017).

    Parameters
    ----------
    states
        K state dicts with the same keys and shapes.
    num_examples
        ``(K,)`` training images of each client.
    """
    share = num_examples.double() / num_examples.double().sum()
    return {name: _weighted([state[name] for state in states], share) for name in states[0]}


def merged(initial: State, states: Sequence[State], weights: Tensor, scale: float) -> dict[str, Tensor]:
    """Add `scale` times the mean update to the common initialisation, and merge the classifier head class by class.

    The body is all weights but the head. Clients that trained on different classes move it in different directions, so
    their mean update is too short; a scale above 1 compensates. Row c of the head moves by the mean of the updates
    weighted by w_k(c). This merge is ours, not the paper's.

    Parameters
    ----------
    initial
        State dict of the common initialisation.
    states
        K uploads.
    weights
        ``(K, C)``, columns sum to one.
    scale
        Factor on the mean update of the body; 1 gives the unweighted average of the clients with a weight above 0.
    """
    return put_together(initial, states, weights, lambda name, updates: scale * mean(updates))


def put_together(
    initial: State, states: Sequence[State], weights: Tensor, update_of: Callable[[str, Sequence[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Merge the classifier head class by class as `merged` does, and all other weights by a rule.

    Parameters
    ----------
    initial, states, weights
        As for `merged`.
    update_of
        Returns the merged update of a tensor, given its name and the updates of the clients with a weight above 0. It
        is called for one tensor at a time, so that only its updates are in memory.
    """
    heard = (weights > 0).any(1).tolist()  # clients with zero weight in every class are left out of the body
    members = [state for state, counts in zip(states, heard, strict=True) if counts]
    out = {}
    for name, start in initial.items():
        if not start.is_floating_point():
            out[name] = start.clone()
        elif name in ("head.weight", "head.bias"):
            updates = torch.stack([state[name] - start for state in states]).flatten(2 if start.ndim > 1 else 1)
            by_class = weights[..., None] if updates.ndim > 2 else weights
            out[name] = start + (by_class * updates).sum(0).reshape(start.shape)
        else:
            out[name] = start + update_of(name, [state[name] - start for state in members])
    return out


def mean(updates: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors of one shape, summed in fp64."""
    return _weighted(updates, torch.full((len(updates),), 1 / len(updates), dtype=torch.float64))


def _weighted(values: Sequence[Tensor], share: Tensor) -> Tensor:
    if not values[0].is_floating_point():
        return values[0].clone()
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, part in zip(values, share.tolist(), strict=True):
        total.add_(value.double(), alpha=part)
    return total.to(values[0].dtype)
