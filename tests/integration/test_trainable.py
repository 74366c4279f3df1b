"""A simulated run whose clients train and upload the last block alone, and its continuation from the small uploads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.integration.faults import QUICK, metrics, run, status

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]


def stored(directory: Path) -> list[Path]:
    return sorted((directory / "uploads" / "round-1").glob("*.safetensors"))


@pytest.mark.parametrize("value", ["last-1", "lora"])
def test_a_run_of_small_uploads_is_resumed_with_the_same_model(tmp_path: Path, value: str):
    changes = ["--set", f"train.trainable={value}", "--set", "run.name=part", "--set", "train.layer-decay=0.75"]
    first = run("simulate", QUICK, "--clients", "3", "--cpus", "1", "--output", tmp_path, *changes)
    assert first.returncode == 0, first.stdout + first.stderr
    directory = tmp_path / "part"
    log = (directory / "log.txt").read_text("utf-8")
    assert f"(train.trainable = {value}; all weights have 0.106 MB)" in log
    sizes = [file.stat().st_size for file in stored(directory)]
    assert len(sizes) == 3
    assert metrics(directory)["upload_mb"] == pytest.approx(sum(sizes) / 3e6, abs=1e-6)
    assert f"upload <b>{sum(sizes) / 3e6:.3g} MB a client" in (directory / "report.html").read_text("utf-8")
    with safe_open(stored(directory)[0], "pt") as file:
        assert not [name for name in file.keys() if name.startswith("patch_embed")]  # noqa: SIM118 - no mapping
    model = (directory / "model" / "model.safetensors").read_bytes()
    before = {file: file.stat().st_mtime_ns for file in stored(directory)}

    # As if the run had ended after its collection.
    (directory / "status.json").write_text(json.dumps({**status(directory), "state": "interrupted"}))
    (directory / "model" / "model.safetensors").unlink()
    again = run("resume", directory, "--plain")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "all uploads of round 1 are already stored" in again.stdout + again.stderr
    assert {file: file.stat().st_mtime_ns for file in stored(directory)} == before
    assert (directory / "model" / "model.safetensors").read_bytes() == model
    assert metrics(directory)["upload_mb"] == pytest.approx(sum(sizes) / 3e6, abs=1e-6)


def test_blocks_that_the_model_lacks_end_a_run_before_a_client_trains(tmp_path: Path):
    result = run("simulate", QUICK, "--clients", "2", "--output", tmp_path, "--set", "train.trainable=last-3")
    assert result.returncode != 0
    assert 'train.trainable = "last-3": the model has 2 blocks' in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
