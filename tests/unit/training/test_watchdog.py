"""A client that works for too long ends, whether or not Python gets to run in it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from fedmitr_flwr.training.time_limit import time_limit

BLOCKED = """
import signal, sys, time
from fedmitr_flwr.training import time_limit
time_limit.GRACE_SECONDS = 0.2
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as code that never comes back to Python
with time_limit.time_limit(0.2, "training"):
    time.sleep(30)
"""


def test_a_block_that_takes_too_long_is_interrupted() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"training took longer than 0\.1 s"), time_limit(0.1, "training"):
        time.sleep(10)
    assert time.monotonic() - start < 5


def test_a_block_in_time_is_left_alone_and_so_is_what_follows() -> None:
    with time_limit(0.1, "training"):
        pass
    time.sleep(0.2)


def test_a_process_that_cannot_be_interrupted_is_ended() -> None:
    result = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 1
    assert "Timeout" in result.stderr
