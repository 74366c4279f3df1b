"""Check whether a machine has what runs need, and say how to supply what is missing."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import InvalidRequirement, Requirement

from fedmitr_flwr.launch.private_flower import bin_dir
from fedmitr_flwr.settings import SettingsError
from fedmitr_flwr.settings.home import expand
from fedmitr_flwr.version import __version__

Level = Literal["ok", "note", "problem"]

# The default ports of the local SuperLink that `flwr run` starts (Flower 1.41 and 1.42).
SUPERLINK_PORTS = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": 39091, "FLWR_LOCAL_CONTROL_API_PORT": 39093}
_LEAST_MEMORY_GB = 4.0
_LEAST_DISK_GB = 5.0


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes
    ----------
    name
        Name of the check.
    level
        ``ok``; ``note`` if runs work but the user should know; ``problem`` if runs will fail.
    found
        What was found, and how to solve a problem.
    """

    name: str
    level: Level
    found: str


def examine(output: Path) -> list[Finding]:
    """Run all checks; `output` is the folder for results."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _packages,
        _flower,
        _processor,
        _gpu,
        lambda: _disk("results", output),
        lambda: _disk("temporary files", Path(os.environ.get("TMPDIR", "/tmp"))),
        _memory,
        _ports,
        _superlink,
    ]
    found = []
    for check in checks:
        try:
            found.append(check())
        except Exception as error:  # one failing check must not hide the results of the others
            name = getattr(check, "__name__", "check").strip("_<>")
            found.append(Finding(name, "note", f"this check failed: {type(error).__name__}: {error}"))
    return found


def _python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return Finding("python", "ok", found)
    return Finding("python", "problem", f"{found}; needs 3.11 or 3.12")


def _packages() -> Finding:
    """Compare the installed packages with this package's requirements."""
    wrong, seen = [], []
    try:
        asked = requires("fedmitr-flwr") or []
    except PackageNotFoundError:
        return Finding("packages", "note", "fedmitr-flwr is importable here but not installed; pip install -e .")
    for text in asked:
        with contextlib.suppress(InvalidRequirement):
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                here = version(requirement.name)
            except PackageNotFoundError:
                wrong.append(f"{requirement.name} is missing")
                continue
            if requirement.name in ("flwr", "torch", "timm", "ray"):
                seen.append(f"{requirement.name} {here}")
            if not requirement.specifier.contains(here, prereleases=True):
                wrong.append(f"{requirement.name} {here}, needs {requirement.specifier}")
    if wrong:
        return Finding("packages", "problem", f"{'; '.join(wrong)}; solve it with pip install -e .")
    return Finding("packages", "ok", f"fedmitr-flwr {__version__}, {', '.join(seen)}")


def _flower() -> Finding:
    flwr = bin_dir() / "flwr"
    if flwr.is_file() and os.access(flwr, os.X_OK):
        return Finding("flwr command", "ok", str(flwr))
    elsewhere = shutil.which("flwr")
    hint = f"; the one at {elsewhere} belongs to another environment" if elsewhere else ""
    return Finding("flwr command", "problem", f"none in {bin_dir()}{hint}; install Flower into this environment")


def _processor() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    limited = f", but OMP_NUM_THREADS = {threads} limits each process" if threads else ""
    return Finding("processor", "note" if limited else "ok", f"{count} cores ({platform.machine()}){limited}")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            names.append(f"{torch.cuda.get_device_name(index)} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free)")
        return Finding("GPU", "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}")
    if (
        shutil.which("nvidia-smi")
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    ):
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return Finding("GPU", "note", f"there is one, but torch does not find it ({built}); runs will use the CPU")
    return Finding("GPU", "note", "none; runs use the CPU")


def _disk(what: str, path: Path) -> Finding:
    try:
        path = expand(path, what).absolute()
    except SettingsError as error:
        return Finding(f"disk for {what}", "problem", str(error))
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        return Finding(f"disk for {what}", "problem", f"{there} cannot be written")
    free = shutil.disk_usage(there).free / 2**30
    found = f"{free:.1f} GiB free at {path}"
    return Finding(f"disk for {what}", "ok" if free >= _LEAST_DISK_GB else "note", found)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    found = f"{free:.1f} of {total:.1f} GiB free"
    if free < _LEAST_MEMORY_GB:
        return Finding(
            "memory", "note", f"{found}; each client on Ray takes about 0.7 GiB; --cpus limits how many run at a time"
        )
    return Finding("memory", "ok", found)


def _ports() -> Finding:
    taken = []
    for name, default in SUPERLINK_PORTS.items():
        port = int(os.environ.get(name, default))
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                taken.append(str(port))
    if taken:
        return Finding(
            "ports",
            "note",
            f"{', '.join(taken)} in use; `flwr run` may find another SuperLink there; `fedmitr simulate` will not",
        )
    return Finding("ports", "ok", "the ports of a local SuperLink are free")


def _superlink() -> Finding:
    """Find SuperLinks that an earlier ``flwr run`` left running, with its environment, directory and code."""
    left = []
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        line = process.info["cmdline"] or []
        if any(Path(word).name == "flower-superlink" for word in line[:3]) and not _is_private(process):
            left.append(f"process {process.info['pid']} in {process.info['cwd']}")
    if left:
        told = "`flwr run` would use it and its old environment; end it first, or use `fedmitr simulate`"
        told = f"{'; '.join(left)}: {told}"
        return Finding("leftover SuperLink", "note", told)
    return Finding("leftover SuperLink", "ok", "none")


def _is_private(process: psutil.Process) -> bool:
    """Return whether the process belongs to a `fedmitr simulate`, which ends it."""
    with contextlib.suppress(psutil.Error, OSError):
        return Path(process.environ().get("FLWR_HOME", "")).name.startswith("fedmitr-")
    return False
