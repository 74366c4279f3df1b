"""Stored lines stay with changed code only when every number has been seen to be equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import fingerprint, same_results
from benchmarks.accuracy import hardware, recipe, settings_for
from benchmarks.fingerprint import results_code

SETTINGS = settings_for("digits", "0.1", 44, {})
LINE: dict[str, Any] = {
    "data": "digits",
    "skew": "0.1",
    "clients": 10,
    "seed": 44,
    "distill_seed": 0,
    "method": "fedmitr",
    "changes": {},
    "recipe": recipe(SETTINGS, {}),
    "code": "stored",
    "global": 0.8,
    "seconds": 9.0,
    "ensembles": {"competence": 0.9},
    "hardware": hardware(),
}


@pytest.fixture
def today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the code computes today; changed by the tests."""
    monkeypatch.setattr(fingerprint, "SAME", tmp_path / "same-code.json")
    monkeypatch.setattr(same_results, "SAME", tmp_path / "same-code.json")
    monkeypatch.setattr(same_results, "read", lambda _: [LINE])
    found = {"global": 0.8, "seconds": 5.0, "ensembles": {"competence": 0.9}}
    monkeypatch.setattr(same_results, "run_again", lambda *_: found)
    return found


def compare(**options: Any) -> None:
    defaults = {"data": "digits", "skews": "0.1", "seeds": "44", "methods": "", "clients": 10, "cache": Path("cache")}
    defaults |= {"against": None}
    same_results.main(**{**defaults, **options})


def test_equal_numbers_let_the_new_code_stand_for_the_old_one_in_this_data_set(today, capsys):
    assert results_code("digits") == fingerprint.fingerprint()
    compare()
    assert "all 1 lines are equal" in capsys.readouterr().err
    assert results_code("digits") == "stored"
    assert results_code("emoji10") == fingerprint.fingerprint()
    entry = json.loads(fingerprint.SAME.read_text())["digits"][fingerprint.fingerprint()]
    assert entry == {"as": "stored", "lines": 1, "hardware": hardware()}


@pytest.mark.parametrize("change", [{"global": 0.801}, {"ensembles": {"competence": 0.901}}])
def test_a_number_that_differs_is_named_and_nothing_is_remembered(today, capsys, change):
    today.update(change)
    with pytest.raises(typer.Exit) as stop:
        compare()
    assert stop.value.exit_code == 1
    said = capsys.readouterr().err
    assert f"{next(iter(change))}: " in said
    assert "1 of 1 lines differ" in said
    assert not fingerprint.SAME.exists()


@pytest.mark.parametrize("options", [{"seeds": "45"}, {"skews": "iid"}, {"clients": 20}, {"methods": "fedavg"}])
def test_nothing_to_compare_is_no_proof(today, capsys, options):
    with pytest.raises(typer.Exit) as stop:
        compare(**options)
    assert stop.value.exit_code == 2
    assert "no stored line of digits" in capsys.readouterr().err
    assert not fingerprint.SAME.exists()


def test_lines_of_other_machines_and_settings_are_not_compared(today, monkeypatch):
    others = [{**LINE, "hardware": "another"}, {**LINE, "recipe": "another"}]
    monkeypatch.setattr(same_results, "read", lambda _: [*others, {**LINE, "method": "hard-labels", "code": "stored"}])
    seen = []
    monkeypatch.setattr(same_results, "run_again", lambda _, row, __: seen.append(row) or today)
    compare()
    assert [row["method"] for row in seen] == ["hard-labels"]


def older(path: Path, code: str, found: dict[str, Any]) -> Path:
    """A checkout whose code is `code` and computes `found`."""
    package = path / "older" / "benchmarks"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "fingerprint.py").write_text(f"def results_code(data):\n    return {code!r}\n")
    again = f"def name_of(data):\n    return data\n\n\ndef run_again(data, row, cache):\n    return {found!r}\n"
    (package / "same_results.py").write_text(again)
    return path / "older"


def test_on_another_processor_the_older_code_runs_too_and_its_numbers_count(today, tmp_path, capsys):
    today["global"] = 0.81
    compare(against=older(tmp_path, "stored", {**today, "seconds": 1.0}))
    assert "all 1 lines are equal" in capsys.readouterr().err
    assert json.loads(fingerprint.SAME.read_text())["digits"][fingerprint.fingerprint()]["both_run"] is True


def test_numbers_that_differ_from_the_older_code_s_are_named(today, tmp_path, capsys):
    with pytest.raises(typer.Exit) as stop:
        compare(against=older(tmp_path, "stored", {**today, "global": 0.7}))
    assert stop.value.exit_code == 1
    assert "global: 0.7 by older code, 0.8 now" in capsys.readouterr().err


def test_a_checkout_of_other_code_is_no_proof(today, tmp_path, capsys):
    with pytest.raises(typer.Exit) as stop:
        compare(against=older(tmp_path, "another", today))
    assert stop.value.exit_code == 2
    assert "the stored lines are those of code stored" in capsys.readouterr().err
    assert not fingerprint.SAME.exists()
