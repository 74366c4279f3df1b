"""The arithmetic of the benchmark, on made-up times."""

import pytest

from benchmarks.inversion.bench import DEMO, Bench, extra_peak_mb, interleaved, ratios, schedule
from benchmarks.inversion.table import COLUMNS, ratios_of, rows


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


def made_up_case(bf16: bool):
    variants = {"reference": 0.4, "fp32": 0.2} | ({"reference-bf16": 0.3, "bf16": 0.1} if bf16 else {})
    seconds = {f"{name} {stage}": [value, 2 * value] for name, value in variants.items() for stage in range(5)}
    memory = {
        f"{name} {stage}": {"teachers_mb": 20.0, "extra_peak_mb": 30.0}
        for name in variants
        for stage in (0, 4)
        if name != "reference-bf16"
    }
    return {"images": 16, "tokens": [5] * 5, "flops": [2e9] * 5, "seconds": seconds, "memory": memory}


def test_the_table_has_a_row_for_each_precision_that_was_measured():
    one, two = rows("tiny", made_up_case(False)), rows("tiny", made_up_case(True))
    assert len(one) == 1
    assert len(two) == 2
    cells = [cell.strip() for cell in one[0].strip("|").split("|")]
    assert len(cells) == len(COLUMNS)
    found = dict(zip(COLUMNS, cells, strict=True))
    assert found["schedule, dense / ours"] == found["schedule, sparse / ours"] == "2.00"
    assert found["spread"] == "67 %"
    assert found["images/s"] == f"{16 / (4000 * 0.3):.4f}"
    assert "| 3.00" in two[1]


def test_a_case_without_a_reference_has_no_ratios():
    case = made_up_case(False)
    case["seconds"] = {key: value for key, value in case["seconds"].items() if key.startswith("fp32")}
    found = dict(zip(COLUMNS, [cell.strip() for cell in rows("demo", case)[0].strip("|").split("|")], strict=True))
    assert found["reference / ours"] == found["schedule, dense / ours"] == ""
    assert ratios_of(case["seconds"], "fp32") == {}


def test_memory_of_a_step_is_above_nothing_and_names_the_teachers_size():
    found = extra_peak_mb(DEMO[0], "reference", 4)
    assert found["teachers_mb"] > 0.7
    assert found["peak_mb"] > found["extra_peak_mb"] >= 0
