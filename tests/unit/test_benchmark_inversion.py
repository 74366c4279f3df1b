"""The arithmetic of the benchmark, on made-up times."""

import pytest

from benchmarks.inversion import DEMO, Bench, interleaved, ratios, schedule


def test_a_schedule_counts_the_iterations_of_each_stage():
    assert schedule([1, 0, 0, 0, 0]) == 50
    assert schedule([0, 0, 0, 0, 1]) == 3700
    assert schedule([1] * 5) == 4000


def test_ratios_are_reference_over_ours():
    tiny = {f"{p} {s}": [0.25] for p in ("fp32", "bf16") for s in range(5)} | {
        "reference 0": [1.0],
        "reference 4": [0.5],
    }
    base = {"fp32 4": [1.0], "bf16 4": [0.5], "reference 4": [3.0, 2.0, 2.0]}
    assert ratios(tiny, base) == {
        "tiny_fp32": 2.0,
        "base_fp32": 2.0,
        "tiny_bf16": 2.0,
        "base_bf16": 4.0,
        "schedule_tiny_fp32_vs_dense": 4.0,
        "schedule_tiny_bf16_vs_dense": 4.0,
    }


def test_variants_take_turns_after_a_round_that_is_not_counted():
    calls = []
    seconds = interleaved({name: (lambda name=name: calls.append(name)) for name in "ab"}, 2)
    assert calls == list("ababab")
    assert [len(times) for times in seconds.values()] == [2, 2]


@pytest.mark.parametrize("case", DEMO[:2], ids=lambda case: case.name)
def test_demo_cases_have_the_stages_of_the_demo(case):
    assert Bench(case).tokens == [50, 35, 24, 17, 12]
