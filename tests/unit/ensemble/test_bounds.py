"""No client decides alone: claims and updates are bounded by those of the others, and honest ones stay unchanged."""

from __future__ import annotations

import pytest
import torch

from fedmitr_flwr.ensemble.bounds import (
    BoundedState,
    bounded_counts,
    dominant,
    update_norms,
    update_scales,
)

HONEST = torch.tensor([387, 1052, 265, 269, 284, 83, 413, 38, 367, 442])
INITIAL = {"a": torch.zeros(3), "b": torch.ones(2, 2), "n": torch.tensor(7)}


def state(scale: float) -> dict[str, torch.Tensor]:
    return {"a": scale * torch.ones(3), "b": 1 + scale * torch.eye(2), "n": torch.tensor(7)}


def test_honest_counts_of_a_skewed_partition_stay():
    assert torch.equal(bounded_counts(HONEST), HONEST.double())


@pytest.mark.parametrize("attackers", [1, 2, 3])
def test_a_claim_of_a_thousand_million_images_counts_no_more_than_a_large_honest_one(attackers: int):
    claimed = HONEST.clone()
    claimed[:attackers] = 10**9
    counted = bounded_counts(claimed)
    assert torch.equal(counted[attackers:], claimed[attackers:].double())
    assert float(counted[:attackers].max()) <= 3 * 442
    assert float((counted / counted.sum())[:attackers].max()) < 0.4


def test_of_two_clients_neither_is_bounded():
    assert bounded_counts(torch.tensor([1, 10**6])).tolist() == [1.0, 1e6]


def test_norms_are_those_of_the_updates_and_integers_have_none():
    norms = update_norms([state(0.0), state(2.0)], INITIAL)
    assert norms.tolist() == [[0.0, 0.0], [pytest.approx(2 * 3**0.5), pytest.approx(2 * 2**0.5)]]


def test_honest_updates_of_different_lengths_stay_and_a_boosted_one_is_shortened_to_the_limit():
    lengths = [0.5, 1.0, 1.0, 1.5, 3.0, -400.0]
    scales = update_scales(update_norms([state(length) for length in lengths], INITIAL), 4.0)
    assert bool((scales[:5] == 1).all())
    shortened = BoundedState(state(-400.0), INITIAL, scales[5])
    assert torch.allclose(shortened["a"], torch.full((3,), -4.0))
    assert torch.allclose(shortened["b"], 1 - 4 * torch.eye(2))
    assert int(shortened["n"]) == 7
    assert list(shortened) == ["a", "b", "n"]


def test_a_single_tensor_that_is_too_far_is_shortened_alone():
    states = [state(1.0) for _ in range(4)]
    states[3]["b"] = 1 + 50 * torch.eye(2)
    scales = update_scales(update_norms(states, INITIAL), 4.0)
    assert float(scales[3, 1]) < 8 / 50 + 1e-9
    assert bool((scales[:3] == 1).all())


@pytest.mark.parametrize(("limit", "count"), [(0.0, 5), (4.0, 2)])
def test_without_a_limit_or_a_majority_nothing_is_shortened(limit: float, count: int):
    states = [state(1.0)] * (count - 1) + [state(1e6)]
    assert bool((update_scales(update_norms(states, INITIAL), limit) == 1).all())


def test_a_client_dominates_only_classes_that_others_know():
    evidence = torch.tensor([[90.0, 10.0, 50.0], [10.0, 0.0, 0.0], [10.0, 0.0, 60.0]])
    weights = evidence / evidence.sum(0)
    assert dominant(weights, evidence) == {0: [0], 2: [2]}
