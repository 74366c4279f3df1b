"""How a simulation's end is told, with a stand-in for Flower: its log may end before the run does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Self

import pytest

from fedmitr_flwr.launch import simulate
from fedmitr_flwr.launch.simulate import RunOutcome
from fedmitr_flwr.runs.directory import STATUS
from fedmitr_flwr.settings import Settings
from tests.pages import ROOT


class Flower:
    """Its run has begun, and its log ends at once; the ServerApp lives until it was looked for three times."""

    def __init__(self, home: Path, run: Path, end: str | None) -> None:
        self.home, self.environment, self.status, self.end = home, dict[str, str](), run / STATUS, end
        self.lives, self.asked = 3, 0
        run.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, state: str) -> None:
        self.status.write_text(json.dumps({"state": state, "error": "the cause" if state == "failed" else None}))

    def start(self, *_: str) -> subprocess.Popen[str]:
        self.write("running")
        command = [sys.executable, "-c", "print('Successfully started run 7')"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def server_apps(self) -> list[int]:
        self.lives -= 1
        if self.lives == 0 and self.end is not None:
            self.write(self.end)
        return [1] if self.lives > 0 else []

    def ask(self, *_: str) -> str:
        self.asked += 1
        return json.dumps({"runs": [{"status": "finished:failed", "status-details": "no heartbeat"}]})


def outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str | None) -> tuple[RunOutcome, Flower, list[str]]:
    flower, said = Flower(tmp_path / "home", tmp_path / "runs" / "one", end), list[str]()
    monkeypatch.setattr(simulate, "PrivateFlower", lambda: flower)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    flower.home.mkdir()
    settings = Settings().replace(**{"run.output": str(tmp_path / "runs"), "run.name": "one"})
    return simulate.simulate(ROOT, settings, {"num-supernodes": 2}, echo=said.append), flower, said


def test_a_run_that_outlives_its_superlink_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, flower, said = outcome(tmp_path, monkeypatch, "completed")
    assert (found.exit_code, found.error) == (0, "")
    assert flower.asked == 0  # Flower knows nothing better than the ServerApp
    assert sum("SuperLink is gone" in line for line in said) == 1


def test_a_run_that_fails_without_its_superlink_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, _ = outcome(tmp_path, monkeypatch, "failed")
    assert (found.exit_code, found.error) == (1, "the cause")


def test_of_a_run_that_died_flower_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, flower, _ = outcome(tmp_path, monkeypatch, None)
    assert (found.exit_code, found.error) == (1, "no heartbeat")
    assert flower.asked == 1
    assert json.loads(flower.status.read_text())["state"] == "failed"
