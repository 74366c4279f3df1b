"""The summary and the picture say what the stored lines say."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import ROOT, main_rows, recipe, settings_for, summarise, teraflops
from benchmarks.accuracy_figure import budgets, curve_of, draw
from benchmarks.accuracy_tables import render, tables
from benchmarks.federation import Federation
from benchmarks.time_to_quality import SMI, accuracies
from fedmitr_flwr.data import load_source
from fedmitr_flwr.pipeline.inputs import Upload
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.settings.choices import MOMENT_METHODS

ENSEMBLES = {"uniform": 0.80, "competence": 0.90}


def row(method: str, accuracy: float, **about: Any) -> dict[str, Any]:
    base = {"skew": "0.1", "clients": 10, "seed": 44, "distill_seed": 0, "changes": {}, "code": "new", "recipe": "r"}
    return {
        **base,
        "method": method,
        "global": accuracy,
        "fedavg": 0.60,
        "teraflops": 100.0,
        "ensembles": ENSEMBLES,
    } | about


ROWS = [
    row("fedmitr", 0.50, code="old"),
    row("fedmitr", 0.84),
    row("fedmitr", 0.86, distill_seed=1),
    row("fedmitr", 0.89, seed=45),
    row("random-images", 0.82),
    row("dense-inversion", 0.83),
    row("fedavg", 0.60, teraflops=0.0),
    row("fedmitr", 0.99, changes={"distill.steps": "9"}, teraflops=50.0),
    row("fedmitr", 0.10, clients=50),
]


def test_the_summary_is_of_the_main_rows_of_the_newest_code():
    found = summarise(main_rows([*ROWS, row("hard-labels", 0.70)]))
    assert found.keys() == {"0.1"}
    expected = {
        "global": 86.33,
        "global_std": 2.83,
        "fedavg": 60.0,
        "ensemble": 90.0,
        "best_baseline": 83.0,
        "best_baseline_name": "dense-inversion",
        "best_baseline_no_inversion": 82.0,
        "dense_same_extras": 83.0,
        "no_histogram": 86.33,
        "seeds": 2,
    }
    assert found["0.1"] == expected


def test_the_picture_has_a_point_for_each_budget(tmp_path: Path):
    rows = [row for row in ROWS if row["code"] == "new" and row["clients"] == 10]
    assert budgets([row for row in rows if row["method"] == "fedmitr"]) == [
        (50.0, 99.0, 0.0),
        (100.0, pytest.approx(87.0), pytest.approx(2.83, abs=0.01)),
    ]
    assert curve_of(ROWS[1]) == "fedmitr"
    assert curve_of(row("fedmitr", 0.7, changes={"distill.noise": "0.0"})) == "fedmitr, no random images"
    draw(rows, "a title", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_tables_take_differences_between_runs_of_the_same_seeds():
    short = {"distill.steps": "9"}
    hard = {**short, "relabel.labels": "hard"}
    more = [
        row("fedmitr", 0.70, changes=hard),
        row("random-images", 0.75, changes=short),
        row("fedmitr", 0.20, seed=46),
    ]
    more.append(row("fedavg", 0.30, clients=3, changes={"partition.kind": "natural"}))
    found = [part.splitlines() for part in tables([*ROWS, *more]).split("\n\n")]
    assert dict(zip((title for [title] in found[::2]), (lines[2:] for lines in found[1::2]), strict=True)) == {
        "### Ten clients": [
            "| `fedmitr` | 64.7 ± 38.7 | 100.0 |",
            "| `random-images` | 82.0 (1) | 100.0 |",
            "| `dense-inversion` | 83.0 (1) | 100.0 |",
            "| `fedavg` | 60.0 (1) | 0.0 |",
            "| ensemble, its best weights | 90.0 ± 0.0 (competence) |  |",
        ],
        "### Other numbers of clients K": [
            "| 0.1 | 10 | 64.7 ± 38.7 | 90.0 ± 0.0 (competence) |",
            "| 0.1 | 50 | 10.0 (1) | 90.0 (1) (competence) |",
        ],
        "### A natural partition: 3 clients, each with a part of its own": [
            "| `fedavg` | 30.0 (1) | 100.0 |",
            "| ensemble, its best weights | 90.0 (1) (competence) |  |",
        ],
        "### Changes at Dirichlet(0.1): to the main settings": [
            "| none | 64.7 ± 38.7 |  |",
            "| `distill.steps=9` | 99.0 (1) | +15.0 (1) |",
        ],
        "### Changes at Dirichlet(0.1): to `distill.steps=9`": [
            "| none | 99.0 (1) |  |",
            "| `relabel.labels=hard` | 70.0 (1) | -29.0 (1) |",
            "| `run.method=random-images` | 75.0 (1) | -24.0 (1) |",
        ],
    }


def test_the_tables_are_of_the_stored_results():
    assert (ROOT / "benchmarks" / "results" / "accuracy.md").read_text("utf-8") == render()


def test_time_to_quality_compares_what_both_recipes_were_run_on_by_the_same_code():
    smi = [row("fedmitr", 0.80, changes=SMI), row("fedmitr", 0.70, seed=46, changes=SMI, code="old")]
    assert accuracies([*ROWS, *smi], "0.1") == {"accuracy": 85.0, "accuracy_smi": 80.0, "seeds": 1}
    assert accuracies(ROWS, "0.1") == {"accuracy": None, "accuracy_smi": None, "seeds": 0}


def test_cost_grows_with_what_a_method_computes():
    settings = settings_for("digits", "0.1", 44, {})
    source = load_source(settings.data)
    federation = Federation(source, {}, [Upload({}, 1, None)] * 10)
    names = [method for method in METHODS if method not in MOMENT_METHODS]
    costs = {method: teraflops(federation, settings.replace(**{"run.method": method})) for method in names}
    assert costs["fedavg"] == costs["head-aggregation"] == 0.0
    assert 0 < costs["random-images"] < costs["fedmitr"] < costs["dense-inversion"] < costs["dense"]


def test_the_recipe_is_what_rows_do_not_name_themselves():
    base = settings_for("mnist-5k", "0.1", 44, {})
    assert recipe(base, {}) == recipe(settings_for("mnist-5k", "iid", 45, {}), {})
    changed = settings_for("mnist-5k", "0.1", 44, {"distill.steps": "9"})
    assert recipe(changed, {}) != recipe(base, {})
    assert recipe(changed, {"distill.steps": "9"}) == recipe(base, {"distill.steps": "9"})
