"""A Flower of one's own for one run: home, ports, environment and processes, all gone afterwards.

``flwr run`` starts a SuperLink that stays behind, keeps the environment, working directory and ports of
whoever started it first, and is shared by all projects of the user (Flower 1.41). `PrivateFlower` gives a
run its own instead. Its processes detach into sessions of their own, so neither a process group nor the
process tree finds them; they all inherit ``FLWR_HOME``, which is unique to the run, and are found by it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

# Ray adds about 70 characters to its folder for a socket, whose path may have 107.
_LONGEST_RAY_FOLDER = 36
_PR_SET_CHILD_SUBREAPER = 36


def bin_dir() -> Path:
    """Folder with the commands of the environment that runs this code."""
    return Path(sys.executable).parent


class PrivateFlower:
    """Context manager that owns a temporary Flower home and every process that belongs to it.

    Parameters
    ----------
    patience
        Seconds that processes get to end after SIGTERM, before SIGKILL.

    Attributes
    ----------
    home
        The temporary folder: Flower's home, Ray's files and `cwd`, the empty working directory that the
        SuperLink, the ServerApp and the clients run in, so that no code is imported from elsewhere.

    Raises
    ------
    FileNotFoundError
        On entering, when there is no ``flwr`` command in this environment.
    """

    def __init__(self, patience: float = 8.0) -> None:
        self.patience = patience
        self.home = Path()
        self.environment: dict[str, str] = {}

    @property
    def cwd(self) -> Path:
        """Working directory of the run's processes."""
        return self.home / "cwd"

    def __enter__(self) -> Self:
        self.home = Path(tempfile.mkdtemp(prefix="fedmitr-")).resolve()
        try:
            self.cwd.mkdir()
            self.renew()
            _adopt_orphans()
        except BaseException:
            shutil.rmtree(self.home, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_processes()
        shutil.rmtree(self.home, ignore_errors=True)

    def renew(self) -> None:
        """Choose free ports, set up the environment of all commands, and remove what an earlier SuperLink left.

        A SuperLink that is killed while it makes its database leaves one that no other can open.
        """
        shutil.rmtree(self.home / "local-superlink", ignore_errors=True)
        http, control = _free_ports(2)
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {
            "PATH": f"{bin_dir()}{os.pathsep}{environment.get('PATH', os.defpath)}",
            "PYTHONUNBUFFERED": "1",
            "FLWR_HOME": str(self.home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            **_without_proxy(),
        }
        if len(str(self.home)) <= _LONGEST_RAY_FOLDER:
            environment["RAY_TMPDIR"] = str(self.home)
        self.environment = environment
        if shutil.which("flwr", path=environment["PATH"]) is None:
            raise FileNotFoundError(f"no `flwr` command in {bin_dir()}: install Flower into this environment")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a ``flwr`` command, its output and errors in one text stream; Ctrl-C doesn't reach it."""
        return subprocess.Popen(
            ["flwr", *arguments],
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

    def ask(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run a short ``flwr`` command and return what it prints; empty when it doesn't answer in time."""
        process = self.start(*arguments)
        try:
            return process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return ""

    def processes(self) -> list[psutil.Process]:
        """Every running process that belongs to this Flower home."""
        return processes_of(self.home)

    def server_apps(self) -> list[psutil.Process]:
        """The process of a simulation's ServerApp, if it runs."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if any(part.endswith("flwr-simulation") for part in process.cmdline()[:3]):
                    found.append(process)
        return found

    def kill_server_app(self) -> None:
        """Kill the ServerApp of a simulation before anything else ends.

        It keeps what is finished on disk at all times; if it saw its clients end, it would take them for failed and go
        on without them.
        """
        for process in self.server_apps():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def end_processes(self) -> None:
        """End all processes of this home, first politely, and return when none is left.

        Raises
        ------
        RuntimeError
            Some survive even SIGKILL (stuck in the kernel); names them.
        """
        deadline = time.monotonic() + self.patience
        left = self.processes()
        seen: dict[int, psutil.Process] = {}
        while left and time.monotonic() < deadline + self.patience:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    if time.monotonic() >= deadline:
                        process.kill()
                    elif process.pid not in seen:
                        process.terminate()
                seen[process.pid] = process
            psutil.wait_procs(left, timeout=0.2)
            left = self.processes()
        psutil.wait_procs(list(seen.values()), timeout=0.5)
        _reap_orphans()
        if left:
            raise RuntimeError(f"processes that don't end: {', '.join(str(process.pid) for process in left)}")


def _without_proxy() -> dict[str, str]:
    """Return the environment's exceptions from its proxy, with this machine added.

    Flower asks its local SuperLink whether it is ready through the user's proxy, which cannot reach it.
    """
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = ",".join(filter(None, (given, "127.0.0.1", "localhost")))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def processes_of(home: Path) -> list[psutil.Process]:
    """Every running process, this one excepted, whose ``FLWR_HOME`` is the given folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
    return found


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that ended ones can be reaped (Linux only).

    Flower's SuperLink is such an orphan. Left to process 1, it and its children stay as zombies in the many
    containers whose process 1 reaps nobody.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap_orphans() -> None:
    """Reap adopted processes that have ended; they are children of a session other than this process's."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, OSError):
            if child.status() == psutil.STATUS_ZOMBIE and os.getsid(child.pid) != os.getsid(0):
                os.waitpid(child.pid, os.WNOHANG)


def _free_ports(count: int) -> list[int]:
    """Ports of the local machine that nobody listens on at this moment, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
