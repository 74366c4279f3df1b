"""The live view, from events to what a person reads."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from fedmitr_flwr.launch.live_view import LiveView, RunState


def state_of(*events: Mapping[str, object]) -> RunState:
    state = RunState()
    for event in events:
        state.take(event)
    return state


def shown(state: RunState, now: float) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(state.draw(now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def client(outcome: str, **more: object) -> dict[str, object]:
    return {"kind": "client", "stage": "clients", "seconds": 1.0, "outcome": outcome, **more}


def test_it_counts_clients_in_and_refused() -> None:
    state = state_of(
        client("asked", count=5), client("accepted"), client("accepted"), client("refused"), client("silent", count=2)
    )
    assert "2 of 5 accepted, 1 refused, 2 failed" in shown(state, 2.0)


def test_it_guesses_from_all_the_time_so_far_when_the_last_client_will_be_in() -> None:
    state = state_of({**client("asked", count=4), "seconds": 0.0}, {**client("accepted"), "seconds": 20.0})
    assert "0:30, 1:30 left" in shown(state, 30.0)
    state.take({**client("accepted"), "seconds": 31.0})
    assert "0:40, 0:40 left" in shown(state, 40.0)


def test_it_shows_rate_time_left_loss_and_memory() -> None:
    state = state_of(
        {"kind": "started", "stage": "invert", "seconds": 10.0},
        {"kind": "progress", "stage": "invert", "seconds": 20.0, "done": 10, "total": 150, "loss": 2.5},
        {
            "kind": "progress",
            "stage": "invert",
            "seconds": 24.0,
            "done": 50,
            "total": 150,
            "loss": 0.25,
            "peak_rss_mb": 800,
        },
    )
    text = shown(state, 24.0)
    assert "10 it/s, 0:10 left" in text
    assert "loss 0.25" in text
    assert "800 MiB" in text


def test_a_value_that_a_later_report_leaves_out_stays() -> None:
    report = {"kind": "progress", "stage": "distill", "seconds": 9.0, "total": 9}
    state = state_of({**report, "done": 1, "kl": 2.0, "agreement": 0.5}, {**report, "done": 2, "kl": 1.0})
    assert "KL 1, agreement with the ensemble 0.5" in shown(state, 9.0)


def test_it_ends_with_the_accuracy() -> None:
    state = state_of({"kind": "progress", "stage": "evaluate", "seconds": 9.0, "done": 1, "total": 1, "global": 0.867})
    assert "accuracy of the global model 0.867" in shown(state, 9.0)


def test_a_stage_that_reports_no_steps_shows_its_time_alone() -> None:
    state = state_of({"kind": "started", "stage": "relabel", "seconds": 10.0})
    (line,) = [line for line in shown(state, 22.0).splitlines() if "Relabeling" in line]
    assert line.split()[-1] == "0:12"


def test_time_left_is_guessed_from_the_first_report_and_not_from_what_a_resumed_stage_had_done() -> None:
    report = {"kind": "progress", "stage": "distill", "total": 100}
    state = state_of({"kind": "started", "stage": "distill", "seconds": 0.0}, {**report, "seconds": 10.0, "done": 25})
    assert "0:12, 0:36 left" in shown(state, 12.0)
    state.take({**report, "seconds": 15.0, "done": 30})
    assert "0:16, 1 it/s, 1:10 left" in shown(state, 16.0)


def test_a_second_round_starts_all_stages_anew() -> None:
    stage = [{"kind": "started", "stage": "invert"}, {"kind": "ended", "stage": "invert"}]
    first, second = client("asked", count=2), client("asked", count=2)
    state = state_of(
        {**first, "seconds": 0.0},
        {**client("accepted"), "seconds": 5.0},
        {**stage[0], "seconds": 7.0},
        {**stage[1], "seconds": 9.0},
        {**second, "seconds": 20.0},
    )
    clients, inversion, *_ = shown(state, 30.0).splitlines()
    assert "0:10" in clients
    assert "0 of 2 accepted" in clients
    assert inversion.split()[-1] == "0:02"
    state.take({**stage[0], "seconds": 40.0})
    clients, inversion, *_ = shown(state, 41.0).splitlines()
    assert "0:20" in clients
    assert inversion.split()[-1] == "0:01"


def test_a_stage_that_ended_shows_how_long_it_took() -> None:
    state = state_of(
        {"kind": "started", "stage": "distill", "seconds": 1.0}, {"kind": "ended", "stage": "distill", "seconds": 66.0}
    )
    (line,) = [line for line in shown(state, 99.0).splitlines() if "Distillation" in line]
    assert "✓" in line
    assert "1:05" in line


def test_the_view_follows_a_file_that_comes_later_and_leaves_an_older_one_alone(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(client("asked", count=9)) + "\n")
    import os

    os.utime(file, (1.0, 1.0))
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with LiveView(file, console) as view:
        view._draw()
        assert view.state.counts["asked"] == 0
        file.write_text(json.dumps(client("asked", count=3)) + "\n" + '{"kind": "cl')
        view._draw()
        assert view.state.counts["asked"] == 3
        view.echo("a line of the log")
    assert "a line of the log" in console.file.getvalue()  # type: ignore[attr-defined]
