"""Real runs with clients that raise, die, stop and hang: each costs its own upload only, and the run ends by itself."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from tests.integration.faults import QUICK, asked, faulty_app, metrics, run, status

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_clients_that_raise_die_stop_or_hang_cost_only_themselves(tmp_path: Path) -> None:
    faults = {
        "partition-1": "raise",
        "partition-2": "die",
        "partition-3": "die once",
        "partition-4": "memory",
        "partition-5": "hang",
        "partition-6": "stop",
    }
    app = faulty_app(tmp_path, faults)
    result = run(
        *("simulate", QUICK, "--app", app, "--clients", "10", "--cpus", "2", "--output", tmp_path),
        *("--set", "run.name=faults", "--set", "run.deadline-seconds=100", "--set", "train.time-limit-seconds=20"),
        *("--set", "run.retries=1"),
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    times = status(tmp_path / "faults")
    took = datetime.fromisoformat(times["ended"]) - datetime.fromisoformat(times["started"])
    assert 100 <= took.total_seconds() < 200  # the one that stopped is waited for until the deadline, and no longer
    clients = metrics(tmp_path / "faults")["clients"]
    assert clients == {"asked": 10, "accepted": 5, "refused": 0, "failed": 5, "empty": 0}
    uploads = {path.stem for path in (tmp_path / "faults" / "uploads" / "round-1").glob("*.safetensors")}
    assert uploads == {f"partition-{n}" for n in (0, 3, 7, 8, 9)}
    begun = asked(tmp_path)
    assert begun["partition-2"] == 2  # once, and run.retries = 1 more
    assert begun["partition-3"] == 2
    assert all(begun[f"partition-{n}"] == 1 for n in (0, 1, 4, 5, 6, 7, 8, 9))
    for text in ("ValueError: no luck today", "partition-4: MemoryError", "training took longer than 20 s"):
        assert text in result.stdout
