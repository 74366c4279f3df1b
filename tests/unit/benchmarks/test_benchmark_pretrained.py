"""The benchmark of pretrained models: settings of a set, and the summary of stored lines."""

from __future__ import annotations

from pathlib import Path

from benchmarks.pretrained import WEIGHTS_ALONE, WITH_MOMENTS, newest, settings_for, summarise
from fedmitr_flwr.pipeline.methods import METHODS


def row(method: str, seed: int, value: float, **more: object) -> dict[str, object]:
    about = {"data": "food12", "skew": "0.1", "seed": seed, "method": method, "on": "test", "changes": {}, "code": "b"}
    return {**about, "global": value, "ensemble": 0.5, **more}


def test_the_summary_has_means_of_the_newest_code_in_percent():
    rows = [
        row("fedavg", 1, 0.1, code="a"),
        row("fedavg", 1, 0.40),
        row("fedavg", 2, 0.42),
        row("head-aggregation", 1, 0.45),
        row("fedmitr", 1, 0.50),
        row("fedmitr", 2, 0.54),
        row("fedmitr", 3, 0.9, on="validation"),
        row("fedmitr", 4, 0.9, changes={"distill.steps": "1"}),
        row("lda", 1, 0.6, skew="natural"),
    ]
    found = summarise(newest(rows))
    assert found["food12"]["fedavg"] == 41.0
    assert found["food12"]["best_merge"] == 45.0
    assert (found["food12"]["global"], found["food12"]["seeds"]) == (52.0, 2)
    assert found["food12"]["lda"] is None
    assert found["natural"] == {"fedavg": None, "lda": 60.0, "global": None}


def test_every_set_uses_the_recipe_and_its_methods_exist():
    for skew, kind in (("0.1", "dirichlet"), ("natural", "natural")):
        settings = settings_for("food12", "npz:food12.npz", Path("vit.safetensors"), skew, 44, {"distill.steps": "7"})
        assert settings.applied_recipe().name == "pretrained"
        assert (settings.partition.kind, settings.distill.steps, settings.data.image_size) == (kind, 7, 84)
    for variants in (WEIGHTS_ALONE, WITH_MOMENTS):
        for changes in variants.values():
            assert settings.replace(**changes).run.method in METHODS
