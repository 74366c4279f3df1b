"""From the uploads to one set of weights without any data: the student's possible starts.

Letters: K teachers, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def fedavg(states: Sequence[State], num_examples: Tensor) -> dict[str, Tensor]:
    """One-shot FedAvg (McMahan et al. 2017): the mean of the weights by number of examples.

    Parameters
    ----------
    states
        K state dicts with the same keys and shapes.
    num_examples
        ``(K,)``.
    """
    share = num_examples.double() / num_examples.double().sum()
    return {name: _weighted([state[name] for state in states], share) for name in states[0]}


def merged(initial: State, states: Sequence[State], weights: Tensor, scale: float) -> dict[str, Tensor]:
    """The common initialisation plus `scale` times the mean update, and a classifier head put together by class.

    Clients that saw different classes move the body in different directions, so that their mean update is too short;
    a scale above one makes up for it. Row c of the head moves by the teachers' updates weighted with w_k(c).
    Ours, not the paper's.

    Parameters
    ----------
    initial
        Common initialisation.
    states
        K uploads.
    weights
        ``(K, C)``, columns sum to one.
    scale
        Of the mean update of the body; 1 is the unweighted average of all that have a weight.
    """
    heard = (weights > 0).any(1).double()  # one without a say in any class has none here either
    even = heard / heard.sum()
    out = {}
    for name, start in initial.items():
        if not start.is_floating_point():
            out[name] = start.clone()
        elif name in ("head.weight", "head.bias"):
            updates = torch.stack([state[name] - start for state in states]).flatten(2 if start.ndim > 1 else 1)
            by_class = weights[..., None] if updates.ndim > 2 else weights
            out[name] = start + (by_class * updates).sum(0).reshape(start.shape)
        else:
            out[name] = start + scale * _weighted([state[name] - start for state in states], even)
    return out


def _weighted(values: Sequence[Tensor], share: Tensor) -> Tensor:
    if not values[0].is_floating_point():
        return values[0].clone()
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, part in zip(values, share.tolist(), strict=True):
        total.add_(value.double(), alpha=part)
    return total.to(values[0].dtype)
