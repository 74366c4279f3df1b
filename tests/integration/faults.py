"""A copy of the app whose clients misbehave, and helpers to disturb a run's processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fedmitr_flwr.launch.private_flower import bin_dir

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "conf" / "quick.toml"

# Appended to the ClientApp of the copy: what each client does in place of training, or before it.
_FAULTY = """

import os as _os
import resource as _resource
import signal as _signal
import time as _time
from pathlib import Path as _Path
import psutil as _psutil

_FAULTS = {faults!r}
_MARKS = _Path({marks!r})
_honest = train_client


def train_client(task, node_config, name):
    fault = _FAULTS.get(name, "")
    (_MARKS / f"{{name}}-{{_time.monotonic_ns()}}").touch()
    if fault == "raise":
        raise ValueError("no luck today")
    if fault == "memory":
        _resource.setrlimit(_resource.RLIMIT_AS, (_psutil.Process().memory_info().vms, _resource.RLIM_INFINITY))
        try:
            bytearray(1 << 32)
        finally:
            _resource.setrlimit(_resource.RLIMIT_AS, (_resource.RLIM_INFINITY, _resource.RLIM_INFINITY))
    if fault == "die" or (fault == "die once" and len(list(_MARKS.glob(name + "-*"))) == 1):
        _os.kill(_os.getpid(), _signal.SIGKILL)
    if fault == "stop":
        _os.kill(_os.getpid(), _signal.SIGSTOP)
    if fault == "hang":
        _time.sleep(10_000)
    if fault.startswith("slow"):
        _time.sleep(float(fault.split()[1]))
    return _honest(task, node_config, name)
"""


def faulty_app(folder: Path, faults: dict[str, str]) -> Path:
    """Copy the app and make some of its clients misbehave; ``folder/marks`` gets a file for each time one is asked."""
    app, marks = folder / "app", folder / "marks"
    marks.mkdir(parents=True)
    for package in ("client_app", "server_app", "fedmitr_flwr"):
        shutil.copytree(ROOT / package, app / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, app / name)
    with (app / "client_app" / "app.py").open("a") as file:
        file.write(_FAULTY.format(faults=faults, marks=str(marks)))
    return app


def asked(folder: Path) -> dict[str, int]:
    """How often each client began to train."""
    names = [path.name.rsplit("-", 1)[0] for path in (folder / "marks").iterdir()]
    return {name: names.count(name) for name in sorted(set(names))}


def command(*arguments: str | Path) -> list[str]:
    return [str(bin_dir() / "fedmitr"), *map(str, arguments)]


def run(*arguments: str | Path, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, check=False)


def start(*arguments: str | Path, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as file:
        return subprocess.Popen(command(*arguments), stdout=file, stderr=subprocess.STDOUT, text=True)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Wait until something holds while a process runs."""
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def server_process(runner: subprocess.Popen[str], program: str = "flwr-simulation") -> psutil.Process:
    """The process of the ServerApp, or of another of Flower's programs, in a simulation that `runner` started."""
    for process in psutil.Process(runner.pid).children(recursive=True):
        try:
            if any(part.endswith(program) for part in process.cmdline()[:3]):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"no process of {program}")


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)


def metrics(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "metrics.json").read_text())
    return loaded


def status(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "status.json").read_text())
    return loaded
