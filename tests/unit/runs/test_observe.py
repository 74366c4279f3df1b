"""Events: what an observer tells, and what listeners make of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from fedmitr_flwr.runs.jsonl import JsonLines, read_events
from fedmitr_flwr.runs.observer import Event, Listener, Observer
from fedmitr_flwr.runs.snapshots import Keeper
from fedmitr_flwr.runs.tensorboard import TensorBoard, boards
from fedmitr_flwr.settings import RunSettings


class Recorder(Listener):
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def receive(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


def test_every_kind_of_event_reaches_a_listener_in_order() -> None:
    recorder = Recorder()
    observer = Observer(recorder)
    with observer.stage("invert"):
        observer.progress("invert", 3, 10, lambda: {"loss": 0.5})
        observer.event("invert", images="1/2")
    observer.client("refused", client="node 7", reason="NaN")
    observer.close()
    assert [event.kind for event in recorder.events] == ["started", "progress", "note", "ended", "client"]
    assert recorder.events[1].values["loss"] == 0.5
    assert recorder.events[3].values["seconds"] == pytest.approx(observer.seconds["invert"], abs=1e-3)
    assert recorder.events[4].values == {"outcome": "refused", "client": "node 7", "reason": "NaN"}
    assert recorder.closed


def test_nothing_is_computed_when_nobody_listens() -> None:
    def expensive() -> dict[str, float]:
        raise AssertionError("asked for")

    observer = Observer()
    observer.progress("distill", 1, 2, expensive)
    assert not observer.watched


def test_a_note_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fedmitr.pipeline"):
        Observer().event("relabel", high_density=0.23456)
    assert "relabel: high density 0.2346" in caplog.text


def test_a_stage_that_fails_still_ends() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError), Observer(recorder).stage("distill"):
        raise KeyError
    assert recorder.events[-1].kind == "ended"


def test_metrics_jsonl_is_json_line_by_line_while_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    observer = Observer(JsonLines(path))
    observer.progress("distill", 1, 2, lambda: {"kl": float("nan"), "ce": 0.123456789})
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert record["kl"] is None
    assert record["ce"] == 0.123457
    assert (record["kind"], record["stage"], record["done"], record["total"]) == ("progress", "distill", 1, 2)


def test_a_killed_run_s_last_half_line_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "note", "stage": "invert", "seconds": 1}\n{"kind": "no')
    assert [event["kind"] for event in read_events(path)] == ["note"]
    assert list(read_events(tmp_path / "none.jsonl")) == []


def test_the_keeper_copies_and_forgets_the_round_before() -> None:
    keeper = Keeper()
    observer = Observer(keeper)
    observer.snapshot("ensemble", weights=torch.ones(2))
    image = torch.zeros(1)
    observer.snapshot("stop", images=image)
    image += 1
    assert keeper.shots["stop"][0]["images"].item() == 0.0
    with observer.stage("invert"):
        assert list(keeper.shots) == ["ensemble"]


def test_tensorboard_shows_scalars_and_images(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observer = Observer(TensorBoard(tmp_path))
    observer.progress("distill", 5, 10, lambda: {"kl": 0.25, "agreement": 0.5})
    shot = {"row": torch.arange(2), "images": torch.rand(2, 1, 8, 8), "kept": torch.arange(6).reshape(2, 3)}
    observer.snapshot("stop", iteration=torch.tensor(7), **shot)
    observer.snapshot("finished", images=torch.rand(2, 3, 8, 8), labels=torch.arange(2))
    observer.event("diagnostics", teachers_agree=0.75)
    observer.event("diagnostics", warning="Images of one class are nearly the same")
    observer.progress("evaluate", 1, 1, lambda: {"fedavg": 0.5, "global": 0.8})
    observer.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    (point,) = board.Scalars("distill/kl")
    assert (point.step, point.value) == (5, 0.25)
    assert board.Scalars("invert/patches_kept")[0].value == 3.0
    assert board.Scalars("diagnostics/teachers_agree")[0].value == 0.75
    assert board.Scalars("evaluate/global")[0].value == pytest.approx(0.8)
    assert {"invert/at_stops", "invert/finished_by_class"} <= {tag.split("/image")[0] for tag in board.Tags()["images"]}


def test_boards_are_made_only_when_asked_for(tmp_path: Path) -> None:
    assert boards(RunSettings(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []
