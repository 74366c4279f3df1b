"""A run directory holds one run, tells the truth about its state, and never touches foreign files."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from fedmitr_flwr.runs.directory import RunDirectory
from fedmitr_flwr.runs.log import console_log, failures_logged
from fedmitr_flwr.settings import SettingsError


def status(run: RunDirectory) -> dict[str, str | None]:
    content: dict[str, str | None] = json.loads((run.path / "status.json").read_text())
    return content


def finished_run(output: Path, name: str) -> Path:
    with RunDirectory.create(str(output), name) as run:
        run.write_json("metrics.json", {"old": 1})
        run.uploads(1).mkdir(parents=True)
        (run.uploads(1) / "collected.json").write_text("old")
        (run.uploads(1) / ".partition-1.safetensors.77.tmp").write_text("half")
        (run.path / "model").mkdir()
        (run.path / "model" / "model.safetensors").write_text("old")
        (run.path / "log.txt").write_text("old")
    return run.path


def test_runs_without_a_name_get_a_folder_each(tmp_path: Path) -> None:
    first, second = RunDirectory.create(str(tmp_path), ""), RunDirectory.create(str(tmp_path), "")
    assert first.path != second.path
    assert first.path.parent == second.path.parent == tmp_path


def test_a_relative_output_counts_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDirectory.create("outputs", "demo").path == tmp_path / "outputs" / "demo"


def test_the_status_follows_the_run(tmp_path: Path) -> None:
    with RunDirectory.create(str(tmp_path), "a") as run:
        assert status(run)["state"] == "running"
        assert status(run)["ended"] is None
    assert status(run)["state"] == "completed"
    assert status(run)["error"] is None


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path), "a")
    with pytest.raises(KeyError), run:
        raise KeyError("x")
    assert (status(run)["state"], status(run)["error"]) == ("failed", "KeyError: 'x'")


def test_a_second_run_under_the_same_name_starts_clean(tmp_path: Path) -> None:
    path = finished_run(tmp_path, "demo")
    run = RunDirectory.create(str(tmp_path), "demo")
    assert run.path == path
    assert sorted(item.name for item in path.rglob("*")) == [".lock"]


def test_foreign_files_survive_a_second_run(tmp_path: Path) -> None:
    path = finished_run(tmp_path, "demo")
    foreign = [path / "notes.md", path / "model" / "mine.bin", path / "uploads" / "round-1" / "readme", path / "x.tmp"]
    for file in foreign:
        file.write_text("mine")
    RunDirectory.create(str(tmp_path), "demo")
    assert all(file.read_text() == "mine" for file in foreign)
    assert not (path / "metrics.json").exists()


@pytest.mark.parametrize("state", ["completed", "failed", "interrupted", "running", None])
def test_a_folder_with_uploads_is_refused_and_nothing_in_it_is_touched(tmp_path: Path, state: str | None) -> None:
    path = finished_run(tmp_path, "demo")
    upload = path / "uploads" / "round-2" / "site-a.safetensors"
    upload.parent.mkdir()
    upload.write_text("an upload")
    if state is None:
        (path / "status.json").unlink()
    else:
        (path / "status.json").write_text(json.dumps({"state": state}))
    before = {item: item.read_bytes() for item in path.rglob("*") if item.is_file()}
    for _ in range(2):  # the refusal leaves no lock behind
        with pytest.raises(SettingsError) as caught:
            RunDirectory.create(str(tmp_path), "demo")
        said = str(caught.value)
        assert said.startswith('run.name = "demo": ')
        assert f"fedmitr resume {path}" in said
        assert "another name" in said
        assert len(said.splitlines()) == 1
    assert {item: item.read_bytes() for item in path.rglob("*") if item.is_file()} == before


def test_the_way_out_of_the_refusal_works(tmp_path: Path) -> None:
    path = finished_run(tmp_path, "demo")
    (path / "uploads" / "round-1" / "site-a.safetensors").write_text("an upload")
    RunDirectory.create(str(tmp_path), "demo-2")
    with RunDirectory.resume(path):
        pass
    (path / "uploads").rename(tmp_path / "kept")
    RunDirectory.create(str(tmp_path), "demo")


def test_a_folder_with_such_files_that_no_run_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("mine")
    with pytest.raises(SettingsError, match=r'run.name = "project": .* has a file config.json that no run wrote'):
        RunDirectory.create(str(tmp_path), "project")
    assert (tmp_path / "project" / "config.json").read_text() == "mine"


def test_two_runs_cannot_share_a_folder_at_the_same_time(tmp_path: Path) -> None:
    with RunDirectory.create(str(tmp_path), "demo") as run:
        run.write_json("metrics.json", {})
        with pytest.raises(SettingsError, match="another run is writing to"):
            RunDirectory.create(str(tmp_path), "demo")
        assert (run.path / "metrics.json").exists()
    RunDirectory.create(str(tmp_path), "demo")


def test_a_refused_folder_is_not_left_locked(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(SettingsError, match=r"has a file log\.txt"):
            RunDirectory.create(str(tmp_path), "a")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/etc", "a\\b"])
def test_a_name_is_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=r"run\.name = .*must be the name of one folder"):
        RunDirectory.create(str(tmp_path), name)


def test_an_output_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"run\.output = .*cannot be written at .*Not a directory"):
        RunDirectory.create(str(tmp_path / "file"), "a")


def test_json_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.create(str(tmp_path), "a")
    run.write_json("metrics.json", {"a": 1.5, "nan": float("nan"), "rows": (1, None, True)})
    assert json.loads((run.path / "metrics.json").read_text()) == {"a": 1.5, "nan": None, "rows": [1, None, True]}

    def power_cut(source: Path, target: Path) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        run.write_json("metrics.json", {"a": 2})
    assert json.loads((run.path / "metrics.json").read_text())["a"] == 1.5
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "metrics.json"]


def test_the_log_holds_ours_with_details_and_flowers_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="flwr")  # as Flower sets it
    run = RunDirectory.create(str(tmp_path), "a")
    with console_log(), run.logging():
        logging.getLogger("fedmitr.strategy").info("ours")
        logging.getLogger("fedmitr.strategy").debug("detail")
        logging.getLogger("flwr").info("flower's")
        logging.getLogger("flwr").debug("noise")
        with pytest.raises(ValueError, match="broken"), failures_logged():
            raise ValueError("broken")
    logging.getLogger("fedmitr.strategy").info("afterwards")
    text = (run.path / "log.txt").read_text()
    assert all(
        part in text for part in ("ours", "detail", "flower's", "The run failed. ValueError: broken", "Traceback")
    )
    assert "noise" not in text
    assert "afterwards" not in text
    shown = capsys.readouterr().err
    assert "INFO :      ours\n" in shown
    assert "detail" not in shown
    assert "Traceback" not in shown
