"""Real runs that are cut off and gone on with: the same model, bit for bit, as a run in one go."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.faults import (
    QUICK,
    asked,
    faulty_app,
    kill,
    metrics,
    run,
    server_process,
    start,
    status,
    wait_for,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]

SETTINGS = {
    "run.checkpoint-seconds": "0",
    "inversion.images": "60",
    "inversion.iterations": "60",
    "distill.steps": "150",
    "distill.noise": "5",
}
SET = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an app in which the last client is slow, so that a run can be met in the midst of collection."""
    folder = tmp_path_factory.mktemp("resume")
    faulty_app(folder, {"partition-3": "slow 3"})
    return folder


def simulate(folder: Path, name: str) -> list[str | Path]:
    place: list[str | Path] = ["--app", folder / "app", "--output", folder, "--set", f"run.name={name}"]
    return ["simulate", QUICK, "--clients", "4", "--cpus", "1", *place, *SET]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The same run in one go."""
    result = run(*simulate(folder, "whole"))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "whole"


def uploads(directory: Path) -> list[Path]:
    return sorted((directory / "uploads" / "round-1").glob("*.safetensors"))


def reached(directory: Path, stage: str) -> bool:
    checkpoints = directory / "checkpoints" / "round-1"
    if stage == "collection":
        return len(uploads(directory)) >= 2
    if stage == "inversion":
        return (checkpoints / "inversion-000000.safetensors").exists()
    return (checkpoints / "distill.pt").exists()


def same_results(one: Path, other: Path) -> None:
    assert (one / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()
    assert metrics(one)["accuracy"] == metrics(other)["accuracy"]
    assert metrics(one)["clients"] == metrics(other)["clients"]


@pytest.mark.parametrize("stage", ["collection", "inversion", "distillation"])
def test_a_killed_server_loses_nothing(folder: Path, whole: Path, stage: str) -> None:
    directory = folder / stage
    process = start(*simulate(folder, stage), log=folder / f"{stage}.log")
    wait_for(lambda: reached(directory, stage), process)
    kill(server_process(process))
    assert process.wait(timeout=400) == 1
    assert status(directory)["state"] == "failed"
    kept = {path: path.stat().st_mtime_ns for path in uploads(directory)}
    before = asked(folder)
    result = run("resume", directory, "--app", folder / "app")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == str(directory)
    same_results(directory, whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    trained_again = sum(asked(folder).values()) - sum(before.values())
    assert trained_again == 4 - len(kept)
    assert not (directory / "checkpoints").exists()


def test_an_interrupted_run_says_so_and_is_gone_on_with(folder: Path, whole: Path) -> None:
    directory = folder / "interrupted"
    process = start(*simulate(folder, "interrupted"), log=folder / "interrupted.log")
    wait_for(lambda: reached(directory, "inversion"), process)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=300) == 130
    assert status(directory)["state"] == "interrupted"
    assert f"fedmitr resume {directory}" in (folder / "interrupted.log").read_text()
    changed = run("resume", directory, "--set", "inversion.iterations=61", "--app", folder / "app")
    assert changed.returncode == 2
    assert "inversion.iterations = 61: cannot change any more" in changed.stderr
    assert run("resume", directory, "--app", folder / "app").returncode == 0
    same_results(directory, whole)


def test_a_finished_run_is_left_alone(folder: Path, whole: Path) -> None:
    before = (whole / "metrics.json").stat().st_mtime_ns
    result = run("resume", whole, timeout=60)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, str(whole))
    assert (whole / "metrics.json").stat().st_mtime_ns == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], check=False)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a small file system here")
    yield place
    subprocess.run(["umount", place], check=False)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(folder: Path, whole: Path, small_disk: Path) -> None:
    directory, log = small_disk / "full", folder / "full.log"
    process = start(*simulate(folder, "full"), "--output", small_disk, log=log)
    wait_for(lambda: uploads(directory), process)
    with (small_disk / "ballast").open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
            file.flush()
    assert process.wait(timeout=400) == 1
    assert "No space left on device" in log.read_text()
    assert uploads(directory)
    (small_disk / "ballast").unlink()
    assert run("resume", directory, "--app", folder / "app").returncode == 0
    same_results(directory, whole)
