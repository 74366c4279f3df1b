"""Merging from weights alone: the rules equal their formulas, and touch only what they should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.ensemble.averaging import merged
from fedmitr_flwr.ensemble.merging import (
    RIDGE,
    ace_merging,
    ace_update,
    task_arithmetic,
    wudi_merging,
    wudi_update,
)
from fedmitr_flwr.federation.plan import plan_memory
from fedmitr_flwr.settings import Settings
from tests.unit.tiny import CLASSES, tiny_vit

K, OUT, IN = 3, 12, 8
EVEN = torch.full((K, CLASSES), 1 / K)
INITIAL = tiny_vit(0).state_dict()
LINEAR = [name for name, value in INITIAL.items() if value.ndim == 2 and not name.startswith("head")]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uploads(scale: float = 0.1) -> list[dict[str, Tensor]]:
    """K uploads in which every weight moved, except for one linear layer."""
    kept = LINEAR[0]
    return [
        {name: value if name == kept else value + scale * draw(*value.shape, seed=k) for name, value in INITIAL.items()}
        for k in range(K)
    ]


def plain_ace(updates: list[Tensor]) -> Tensor:
    centred = [update.double() - update.double().mean(0, keepdim=True) for update in updates]
    grams = [each.T @ each for each in centred]
    ridge = RIDGE * sum(float(gram.trace()) for gram in grams) / (len(grams) * IN)
    full = [gram + ridge * torch.eye(IN, dtype=torch.float64) for gram in grams]
    return (
        sum(update.double() @ gram for update, gram in zip(updates, full, strict=True))
        @ torch.stack(full).sum(0).inverse()
    )


def interference(merged_update: Tensor, updates: list[Tensor]) -> Tensor:
    return torch.stack([((merged_update - d) @ d.T).square().sum() / d.square().sum() for d in updates]).sum()


def in_turn() -> list[Tensor]:
    """Updates whose rows lie in subspaces that are orthogonal to each other."""
    basis = torch.linalg.qr(draw(IN, IN, seed=9)).Q
    return [draw(OUT, 2, seed=k) @ basis[:, 2 * k : 2 * k + 2].T for k in range(K)]


def test_ace_equals_regmean_on_the_estimated_covariances() -> None:
    updates = [(k + 1) * draw(OUT, IN, seed=k) for k in range(K)]
    assert torch.allclose(ace_update(updates).double(), plain_ace(updates), atol=1e-5)


@pytest.mark.parametrize(("rule", "most"), [(ace_update, 1e-5), (wudi_update, 0.3)])
def test_equal_updates_merge_to_that_update(rule: Callable[[list[Tensor]], Tensor], most: float) -> None:
    update = 1e-3 * draw(OUT, IN)  # the start of WUDI, the sum, is 2 away
    assert float((rule([update] * K) - update).norm() / update.norm()) < most


def test_a_direction_in_which_one_client_moved_is_not_shortened() -> None:
    updates = in_turn()
    average = torch.stack(updates).mean(0)
    for update in updates:
        inputs = update / update.norm()
        wanted = (inputs @ update.T).norm()
        models = (ace_update(updates), wudi_update(updates), average)
        kept = [float((inputs @ each.T).norm() / wanted) for each in models]
        assert kept[0] > 0.85
        assert kept[1] > 0.95
        assert kept[2] == pytest.approx(1 / K, abs=0.01)


def test_wudi_lowers_the_interference_below_that_of_sum_and_mean() -> None:
    updates = [1e-4 * (k + 1) * draw(OUT, IN, seed=k) for k in range(K)]
    found = float(interference(wudi_update(updates), updates))
    for other in (torch.stack(updates).sum(0), torch.stack(updates).mean(0)):
        assert found < 0.8 * float(interference(other, updates))


def test_the_size_of_the_updates_does_not_matter() -> None:
    updates = [draw(OUT, IN, seed=k) for k in range(K)]
    for rule in (ace_update, wudi_update):
        small = rule([1e-5 * update for update in updates])
        assert torch.allclose(1e5 * small, rule(updates), atol=1e-2)


def test_updates_of_clients_that_did_not_train_leave_finite_weights() -> None:
    nothing, one = torch.zeros(OUT, IN), draw(OUT, IN)
    for rule in (ace_update, wudi_update):
        assert torch.equal(rule([nothing, nothing]), nothing)
        assert bool(torch.isfinite(rule([nothing, one])).all())
        assert bool(torch.isfinite(rule([torch.ones(OUT, IN), nothing])).all())


@pytest.mark.parametrize("merge", [ace_merging, wudi_merging])
def test_only_linear_layers_that_were_trained_are_merged_by_the_rule(
    merge: Callable[[dict[str, Tensor], list[dict[str, Tensor]], Tensor], dict[str, Tensor]],
) -> None:
    states = uploads()
    got, plain = merge(INITIAL, states, EVEN), merged(INITIAL, states, EVEN, 1.0)
    assert got.keys() == INITIAL.keys()
    differ = [name for name in got if not torch.equal(got[name], plain[name])]
    assert differ == LINEAR[1:]
    assert torch.equal(got[LINEAR[0]], INITIAL[LINEAR[0]])
    assert all(value.dtype == INITIAL[name].dtype for name, value in got.items())
    assert all(bool(torch.isfinite(value).all()) for value in got.values())


def test_task_arithmetic_adds_the_scaled_sum_and_merges_the_head_by_class() -> None:
    states = uploads()
    weights = torch.rand(K, CLASSES, generator=torch.Generator().manual_seed(1))
    weights = weights / weights.sum(0)
    got, plain = task_arithmetic(INITIAL, states, weights, 0.4), merged(INITIAL, states, weights, 1.0)
    for name, start in INITIAL.items():
        total = start + 0.4 * torch.stack([state[name] - start for state in states]).sum(0)
        expected = plain[name] if name.startswith("head") else total
        assert torch.allclose(got[name], expected, atol=1e-5), name
    same = task_arithmetic(INITIAL, states, weights, 1 / K)
    assert all(torch.allclose(same[name], plain[name], atol=1e-6) for name in same)


@pytest.mark.parametrize("merge", [lambda *a: task_arithmetic(*a, 0.3), ace_merging, wudi_merging])
def test_clients_without_weight_in_any_class_are_left_out(merge: Callable[..., dict[str, Tensor]]) -> None:
    states = uploads()
    weights = torch.cat([torch.full((K - 1, CLASSES), 1 / (K - 1)), torch.zeros(1, CLASSES)])
    got, fewer = merge(INITIAL, states, weights), merge(INITIAL, states[:-1], weights[:-1])
    assert all(torch.allclose(got[name], fewer[name], atol=1e-6) for name in got)


@pytest.mark.parametrize("key", ["run.method", "distill.start"])
def test_the_memory_plan_counts_the_matrices_of_the_rules(key: str) -> None:
    spec, asked = ImageSpec(("cat", "dog"), 1, 28, (0.5,), (0.5,)), Settings().replace(**{"run.memory-mb": 9000})
    needed = [
        plan_memory(asked.replace(**{key: name}), spec, 10, torch.device("cpu")).distillation
        for name in ("task-arithmetic", "ace-merging", "wudi-merging")
    ]
    assert needed[0] < needed[1] == needed[2]
