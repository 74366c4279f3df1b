"""`fedmitr doctor`, against things that are wrong on purpose."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedmitr_flwr.cli import app
from fedmitr_flwr.launch import doctor


def finding(findings: list[doctor.Finding], name: str) -> doctor.Finding:
    (found,) = [item for item in findings if item.name == name]
    return found


def test_a_healthy_machine_has_no_problem(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--output", str(tmp_path), "--json"])
    findings = {item["name"]: item for item in json.loads(result.stdout)}
    assert result.exit_code == 0, result.output
    assert {"python", "packages", "flwr command", "GPU", "memory", "ports", "leftover SuperLink"} <= findings.keys()
    assert findings["packages"]["level"] == "ok"
    assert f"flwr {version('flwr')}" in findings["packages"]["found"]


def test_a_missing_package_is_a_problem_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: ["no-such-package>=1", "torch>=99", "onnx; extra == 'onnx'"])
    result = CliRunner().invoke(app, ["doctor", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "no-such-package is missing" in result.stdout
    assert "needs >=99" in result.stdout
    assert "onnx is missing" not in result.stdout


def test_another_environment_s_flwr_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "bin_dir", lambda: tmp_path)
    assert finding(doctor.examine(tmp_path), "flwr command").level == "problem"


def test_a_taken_port_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv("FLWR_LOCAL_CONTROL_API_PORT", str(port))
        found = finding(doctor.examine(tmp_path), "ports")
    assert found.level == "note"
    assert str(port) in found.found


def test_a_superlink_that_stayed_behind_is_named_with_its_directory(tmp_path: Path) -> None:
    script = tmp_path / "flower-superlink"
    script.write_text("import time; print(1, flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        found = finding(doctor.examine(tmp_path), "leftover SuperLink")
    finally:
        process.kill()
        process.communicate()
    assert found.level == "note"
    assert f"process {process.pid} in {tmp_path}" in found.found


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: object) -> object:
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "requires", broken)
    findings = doctor.examine(tmp_path)
    assert finding(findings, "packages").found == "this check failed: RuntimeError: boom"
    assert finding(findings, "python").level == "ok"
