"""A ServerApp in a thread stops when Flower ends the process, and says so; one that is finished is left alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.supercore.exit import exit_handler

from fedmitr_flwr.federation.stopping import RunStopped, stopped_with_flower
from fedmitr_flwr.runs.directory import RunDirectory


@pytest.fixture(autouse=True)
def _own_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_handler, "registered_exit_handlers", [])


def in_thread(work: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, errors


def test_a_run_in_a_thread_is_over_and_marked_as_interrupted_before_flower_goes_on_to_end(tmp_path: Path) -> None:
    begun = threading.Event()

    def serve() -> None:
        with stopped_with_flower(), RunDirectory.create(str(tmp_path), "run"):
            begun.set()
            while True:
                time.sleep(0.01)

    thread, errors = in_thread(serve)
    assert begun.wait(10)
    exit_handler.trigger_exit_handlers(run_before_force_exit=True)  # as `flwr_exit` does, in the main thread
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert "stopped from outside" in status["error"]
    thread.join(10)
    assert [type(error) for error in errors] == [RunStopped]


def test_a_run_that_is_over_is_not_disturbed(tmp_path: Path) -> None:
    over, go_on = threading.Event(), threading.Event()

    def serve() -> None:
        with stopped_with_flower(), RunDirectory.create(str(tmp_path), "run"):
            pass
        over.set()
        go_on.wait(10)

    thread, errors = in_thread(serve)
    assert over.wait(10)
    exit_handler.trigger_exit_handlers(run_before_force_exit=True)
    go_on.set()
    thread.join(10)
    assert errors == []
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "completed"


def test_a_run_in_the_main_thread_that_exits_is_interrupted_and_not_failed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), stopped_with_flower(), RunDirectory.create(str(tmp_path), "run"):
        raise SystemExit(0)  # what Flower's signal handler does
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"
