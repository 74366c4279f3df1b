"""Merge the uploads from their weights alone: task arithmetic, ACE-Merging and WUDI-Merging.

Each of them is a rule for the merged update of one weight matrix, given the clients' updates D_k of this matrix, the
uploads minus the common initialisation. The classifier head is merged class by class for all of them, as in
`averaging.merged`, because its rows belong to classes that some clients do not have. ACE and WUDI merge the matrices of
the linear layers; all other weights of the body (biases, norms, patch and position embedding) move by the mean update.

Letters: K clients, o outputs and i inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedmitr_flwr.ensemble.averaging import State, mean, put_together

RIDGE = 0.1
"""The e of ACE-Merging, as a multiple of the mean eigenvalue of the clients' Gram matrices."""

WUDI_STEPS, WUDI_RATE = 300, 0.05
"""Number of Adam's steps in WUDI-Merging, and its learning rate as a multiple of the updates' root mean square."""


def task_arithmetic(initial: State, states: Sequence[State], weights: Tensor, scale: float) -> dict[str, Tensor]:
    """Add `scale` times the sum of the updates to the initialisation (Ilharco et al. 2023, arXiv 2212.04089).

    Parameters
    ----------
    initial, states, weights
        As for `averaging.merged`. A client with weight 0 in every class is left out.
    scale
        Factor on the sum of the updates of all weights but the head.
    """
    return put_together(initial, states, weights, lambda name, updates: scale * len(updates) * mean(updates))


def ace_merging(
    initial: State, states: Sequence[State], weights: Tensor, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Merge linear layers by estimated covariances of their inputs (ACE-Merging, arXiv 2603.02945).

    RegMean (arXiv 2212.09849) merges a linear layer by ``(sum_k D_k S_k) (sum_k S_k)^-1``, S_k the second moments of
    client k's inputs to this layer. ACE estimates them from the update, whose rows are sums of inputs::

        S_k = (D_k - m_k)^T (D_k - m_k) + e I,    m_k the mean row of D_k

    A direction of the inputs in which one client alone moved is merged with nearly the whole of its update, where an
    average would shorten it to 1/K.

    Departures: e is relative to the updates, 0.01 in the paper's code. The paper's normalisation of clients whose
    updates differ much in size, its structural prior and its spectral refinement are left out.

    Parameters
    ----------
    initial, states, weights
        As for `task_arithmetic`.
    device
        Device of the computation; None: the CPU.
    """
    return _linear_layers(initial, states, weights, ace_update, device)


def wudi_merging(
    initial: State, states: Sequence[State], weights: Tensor, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Merge linear layers so that the merged update interferes little with each client's (WUDI, arXiv 2503.08099).

    The update W of a layer starts as the sum of the D_k and is optimised by Adam to lower::

        sum_k ||(W - D_k) D_k^T||_F^2 / ||D_k||_F^2

    The rows of D_k span approximately the inputs that client k trained on, so the term is small if W gives the same
    outputs as D_k for these inputs.

    Departures: the learning rate is relative to the size of the updates; the paper's is 1e-5. The number of steps is
    the paper's, 300. It matters, because the minimum itself is ill-conditioned (arXiv 2606.07289).

    Parameters
    ----------
    initial, states, weights, device
        As for `ace_merging`.
    """
    return _linear_layers(initial, states, weights, wudi_update, device)


def ace_update(updates: Sequence[Tensor]) -> Tensor:
    """Return ACE's merged update ``(o, i)`` of one linear layer; the mean if no update differs between its rows.

    Parameters
    ----------
    updates
        K updates ``(o, i)`` on one device.
    """
    grams, weighted = torch.zeros(()), torch.zeros(())
    for update in updates:
        centred = update - update.mean(0)
        gram = (centred.T @ centred).double()
        grams, weighted = gram + grams, update.double() @ gram + weighted
    ridge = RIDGE * float(grams.diagonal().mean())  # K e
    if ridge == 0.0:
        return mean(updates)
    grams.diagonal().add_(ridge)
    merged: Tensor = torch.linalg.solve(grams, (weighted + ridge * mean(updates).double()).T)
    return merged.T.to(updates[0].dtype)


def wudi_update(updates: Sequence[Tensor]) -> Tensor:
    """Return WUDI's merged update ``(o, i)`` of one linear layer.

    With ``G = sum_k D_k^T D_k / |D_k|^2`` and ``B = sum_k D_k D_k^T D_k / |D_k|^2``, the gradient is ``2 (W G - B)``.
    A step therefore costs the same for any K.

    Parameters
    ----------
    updates
        As for `ace_update`. One that is zero has no part.
    """
    moved = [update for update in updates if bool(update.any())]
    if not moved:
        return torch.zeros_like(updates[0])
    grams, targets = torch.zeros_like(moved[0].T @ moved[0]), torch.zeros_like(moved[0])
    for update in moved:
        gram = update.T @ update / update.square().sum()
        grams += gram
        targets += update @ gram
    merged = sum(moved, torch.zeros_like(moved[0])).requires_grad_(True)
    size = float(torch.stack([update.square().mean() for update in moved]).mean().sqrt())
    optimizer = torch.optim.Adam([merged], WUDI_RATE * size, eps=1e-30)
    for _ in range(WUDI_STEPS):
        merged.grad = 2 * (merged.detach() @ grams - targets)
        optimizer.step()
    return merged.detach()


def _linear_layers(
    initial: State,
    states: Sequence[State],
    weights: Tensor,
    rule: Callable[[Sequence[Tensor]], Tensor],
    device: torch.device | None,
) -> dict[str, Tensor]:
    """Merge the matrices of the trained linear layers by `rule`, and all other weights of the body by the mean."""

    def update_of(name: str, updates: Sequence[Tensor]) -> Tensor:
        linear = updates[0].ndim == 2 and name.endswith(".weight") and not name.startswith("head")
        if not linear or not any(bool(update.any()) for update in updates):
            return mean(updates)
        return rule([update.to(device or "cpu") for update in updates]).cpu()

    return put_together(initial, states, weights, update_of)
