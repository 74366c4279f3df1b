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
    "run.checkpoint-seconds": "1",
    "inversion.images": "120",
    "inversion.iterations": "150",
    "distill.steps": "800",
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


def finished(directory: Path, pattern: str) -> dict[str, int]:
    """The files of a kind that a run has finished, and when."""
    return {path.name: path.stat().st_mtime_ns for path in (directory / "checkpoints" / "round-1").glob(pattern)}


def same_results(one: Path, other: Path) -> None:
    assert (one / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()
    assert metrics(one)["accuracy"] == metrics(other)["accuracy"]
    assert metrics(one)["clients"] == metrics(other)["clients"]


def test_a_run_that_is_cut_off_again_and_again_loses_nothing(folder: Path, whole: Path) -> None:
    """Each cut meets a run that went on from the one before: so what is finished must survive all of them."""
    directory, log = folder / "cut", folder / "cut.log"
    go_on = ["resume", directory, "--app", folder / "app", "--plain"]

    process = start(*simulate(folder, "cut"), log=log)
    wait_for(lambda: len(uploads(directory)) >= 2, process)
    kill(server_process(process))
    assert process.wait(timeout=400) == 1
    assert status(directory)["state"] == "failed"
    kept = {path: path.stat().st_mtime_ns for path in uploads(directory)}
    begun = sum(asked(folder).values())

    process = start(*go_on, log=log)  # Ctrl-C in the midst of inversion
    wait_for(lambda: finished(directory, "inversion-*"), process)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=400) == 130
    assert status(directory)["state"] == "interrupted"
    assert f"fedmitr resume {directory}" in log.read_text()
    assert sum(asked(folder).values()) - begun == 4 - len(kept)
    changed = run(*go_on, "--set", "inversion.iterations=61")
    assert changed.returncode == 2
    assert "inversion.iterations = 61: cannot change, because" in changed.stderr

    batches = finished(directory, "inversion-*")
    process = start(*go_on, log=log)
    wait_for(lambda: len(finished(directory, "inversion-*")) > len(batches), process)
    kill(server_process(process))
    assert process.wait(timeout=400) == 1
    assert finished(directory, "inversion-*").items() > batches.items()

    process = start(*go_on, log=log)
    wait_for(lambda: finished(directory, "distill*"), process)
    kill(server_process(process))
    assert process.wait(timeout=400) == 1

    reached = finished(directory, "distill*")
    process = start(*go_on, log=log)  # the SuperLink ends, and the run goes on without it
    wait_for(lambda: finished(directory, "distill*") != reached, process)
    server_process(process, "flower-superlink").terminate()
    assert process.wait(timeout=400) == 0
    assert status(directory)["state"] == "completed"
    assert "distill: resuming after step" in log.read_text()
    assert log.read_text().splitlines()[-1] == str(directory)
    same_results(directory, whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sum(asked(folder).values()) - begun == 4 - len(kept)
    assert not (directory / "checkpoints").exists()


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
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    assert process.wait(timeout=400) == 1
    assert "No space left on device" in log.read_text()
    assert uploads(directory)
    (small_disk / "ballast").unlink()
    assert run("resume", directory, "--app", folder / "app").returncode == 0
    same_results(directory, whole)
