"""The arithmetic of the benchmark of observers, on made-up times."""

from __future__ import annotations

import time

import pytest

from benchmarks.observers import TimedObserver, summarise
from fedmitr_flwr.runs.observer import Event, Listener


class Busy(Listener):
    """Takes a while over each event."""

    def receive(self, event: Event) -> None:
        start = time.process_time()
        while time.process_time() - start < 0.02:
            pass


def test_shares_are_of_all_repeats_and_the_difference_is_of_medians():
    found = summarise(
        {"off": [10.0, 10.0, 50.0], "on": [10.1, 10.2, 9.7]}, {"off": [0.0, 0.0, 0.0], "on": [0.1, 0.1, 0.1]}
    )
    assert found["off"]["inside_percent"] == 0.0
    assert found["on"]["inside_percent"] == pytest.approx(1.0)
    assert found["on"]["over_off_percent"] == pytest.approx(1.0)


def test_time_in_a_listener_counts_as_inside_and_time_beside_it_does_not():
    quiet, busy = TimedObserver(), TimedObserver(Busy())
    for observer in (quiet, busy):
        observer.progress("distill", 1, 2, dict)
        Busy().receive(Event("note", "distill", 0.0))
    assert quiet.inside < 0.01
    assert 0.02 <= busy.inside < 0.04
