"""The live view, from events to what a person reads."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from fedmitr_flwr.launch.live_view import LiveView, RunState, render_state


def state_of(*events: Mapping[str, object]) -> RunState:
    state = RunState()
    for event in events:
        state.take(event)
    return state


def shown(state: RunState, now: float) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(render_state(state, now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def client(outcome: str, **more: object) -> dict[str, object]:
    return {"kind": "client", "stage": "clients", "seconds": 1.0, "outcome": outcome, **more}


def test_it_counts_clients_in_and_refused() -> None:
    state = state_of(
        client("asked", count=5), client("accepted"), client("accepted"), client("refused"), client("silent", count=2)
    )
    assert "2 of 5 in, 1 refused, 2 failed" in shown(state, 2.0)


def test_it_guesses_when_the_last_client_will_be_in() -> None:
    state = state_of({**client("asked", count=4), "seconds": 0.0}, {**client("accepted"), "seconds": 20.0})
    assert "0:30, 1:30 left" in shown(state, 30.0)


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


def test_it_ends_with_the_accuracy() -> None:
    state = state_of({"kind": "progress", "stage": "evaluate", "seconds": 9.0, "done": 1, "total": 1, "global": 0.867})
    assert "accuracy of the global model 0.867" in shown(state, 9.0)


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
        assert view.state.asked == 0
        file.write_text(json.dumps(client("asked", count=3)) + "\n" + '{"kind": "cl')
        view._draw()
        assert view.state.asked == 3
        view.echo("a line of the log")
    assert "a line of the log" in console.file.getvalue()  # type: ignore[attr-defined]
