"""The benchmark's GPU part, on made-up times and on a CPU."""

import pytest
import torch

from benchmarks.inversion import cuda
from benchmarks.inversion.bench import DEMO, Bench
from benchmarks.inversion.cuda import COLUMNS, full, interleaved, measure, ratios, rows, table

TIMES = {"reference-fp32": 0.4, "reference-bf16": 0.3, "eager-fp32": 0.2, "eager-bf16": 0.2, "graph-fp32": 0.1}
TIMES["graph-bf16"] = 0.05


def made_up(plain_stages=range(5)):
    return {
        f"{name} {stage}": [value, value, 2 * value]
        for name, value in TIMES.items()
        for stage in range(5)
        if "reference" not in name or stage in plain_stages
    }


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The commands of a GPU on a CPU, without the waiting."""
    monkeypatch.setattr(cuda, "Bench", lambda case, device: Bench(case))
    monkeypatch.setattr(cuda, "hardware", lambda: {"gpu": "none"})
    monkeypatch.setattr(cuda, "SAMPLE", 0.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_ratios_are_over_the_graph_in_the_same_precision():
    times = {key: values[0] for key, values in made_up().items()}
    assert ratios(times, "fp32") == pytest.approx(
        {"eager, last stage": 2, "last stage": 4, "schedule, sparse": 4, "schedule, dense": 4}
    )
    assert ratios(times, "bf16")["last stage"] == pytest.approx(6)


def test_a_case_whose_reference_is_measured_at_the_last_stage_alone_has_no_schedule_of_it():
    lines = rows("demo", {"images": 40, "graphs": True, "seconds": made_up((4,))})
    found = dict(zip(COLUMNS, [cell.strip() for cell in lines[0].strip("|").split("|")], strict=True))
    assert found["reference"] == "- / - / - / - / 400.00"
    assert found["schedule, sparse / graph"] == "-"
    assert found["spread"] == "100 %"
    assert found["schedule, s"] == "400.0"


def test_variants_take_turns_after_those_that_record(monkeypatch, on_a_cpu):
    calls = []
    seconds = interleaved({name: (lambda name=name: calls.append(name)) for name in "ab"}, 2)
    assert "".join(calls) == "aaaaaabbbbbb" + "abab"
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_all_variants_are_measured_and_written(tmp_path, on_a_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "EVERY", (0, 4))
    monkeypatch.setattr(cuda, "schedule", sum)
    found = measure(DEMO[0], (4,), (4,), 1, plain_bf16=True)
    assert sorted(found) == sorted(f"{name} 4" for name in TIMES)
    summary = full([DEMO[0]], 1, tmp_path)
    assert "demo K=1 bf16 schedule, dense" in summary
    page = (tmp_path / "inversion-cuda.md").read_text()
    assert page.count("| demo K=1, B=40 |") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inversion-cuda.json", "inversion-cuda.md"]


def test_the_quick_values_have_the_names_of_the_cpu_and_eager_ones(on_a_cpu, monkeypatch):
    times = made_up()
    monkeypatch.setattr(cuda, "measure", lambda *given, **more: times)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    found = cuda.quick(1)
    assert found["tiny_fp32"] == found["base_fp32"] == found["schedule_tiny_fp32_vs_dense"] == 4
    assert found["tiny_fp32_eager"] == 2
    assert len(found) == 13


def test_the_page_names_the_hardware():
    assert "H100" in table({"hardware": {"gpu": "H100"}, "cases": {}})
