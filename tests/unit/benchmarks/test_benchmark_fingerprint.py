"""Results of the same computation have the same fingerprint, whatever the texts around it say."""

import ast

import pytest

from benchmarks import fingerprint as module
from benchmarks.fingerprint import fingerprint, reachable


def of(monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    monkeypatch.setattr(module, "reachable", lambda: {"a": ast.parse(text)})
    return fingerprint.__wrapped__()


def test_what_results_depend_on_is_in_it_and_what_they_do_not_is_not():
    names = set(reachable())
    assert {
        "fedmitr_flwr.ensemble.engine.passes",
        "fedmitr_flwr.stages.random_images",
        "fedmitr_flwr.training.local",
        "fedmitr_flwr.data.sources.npz",
    } <= names
    assert {
        "fedmitr_flwr.pipeline.methods.dense",
        "fedmitr_flwr.settings.server_stages",
        "benchmarks.federation",
    } <= names
    assert not any(name.startswith(("fedmitr_flwr.cli", "fedmitr_flwr.results.report")) for name in names)
    assert not names & {
        "fedmitr_flwr.federation.strategy",
        "fedmitr_flwr.launch.certs",
        "fedmitr_flwr.federation.collection",
        "timm",
        "torch",
    }


def test_texts_do_not_count_and_code_does(monkeypatch: pytest.MonkeyPatch):
    base = of(monkeypatch, 'x = Field(1, description="one")')
    assert of(monkeypatch, '"""A module."""\nx = Field(1, description="another")  # a comment') == base
    assert of(monkeypatch, 'x = Field(2, description="one")') != base
