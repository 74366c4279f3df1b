"""Give one run its own Flower home, ports, environment and processes, and remove them afterwards.

``flwr run`` starts a SuperLink and leaves it running. All projects of the user share it, and it keeps the environment,
working directory and ports with which it was started first (Flower 1.41 and 1.42). `PrivateFlower` gives a run a
SuperLink of its own. Flower's processes detach into their own sessions, so neither a process group nor the process
tree contains them all. They all inherit ``FLWR_HOME``, which is unique to the run, and are found by it.
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

# Ray adds about 70 characters to its folder for the path of a socket, which may have 107 characters.
_LONGEST_RAY_FOLDER = 36
_PR_SET_CHILD_SUBREAPER = 36


def bin_dir() -> Path:
    """Return the folder with the commands of the environment that runs this code."""
    return Path(sys.executable).parent


class PrivateFlower:
    """Context manager that owns a temporary Flower home and all processes that belong to it.

    Parameters
    ----------
    patience
        Seconds between SIGTERM and SIGKILL when processes are ended.

    Attributes
    ----------
    home
        The temporary folder. It is Flower's home, and holds Ray's files and `cwd`. `cwd` is the empty working directory
        of the SuperLink, the ServerApp and the clients, so that they import no code from another project.

    Raises
    ------
    FileNotFoundError
        On entering, if this environment has no ``flwr`` command.
    """

    def __init__(self, patience: float = 8.0) -> None:
        self.patience = patience
        self.home = Path()
        self.environment: dict[str, str] = {}

    @property
    def cwd(self) -> Path:
        """The working directory of the run's processes."""
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
        dropped = {"RAY_ADDRESS", *_unusable_proxies()}
        environment = {key: value for key, value in os.environ.items() if key not in dropped}
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
        """Start a ``flwr`` command with stdout and stderr in one text stream. Ctrl-C does not reach it."""
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
        """Run a short ``flwr`` command and return its output; empty if it does not end in time."""
        process = self.start(*arguments)
        try:
            return process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return ""

    def processes(self) -> list[psutil.Process]:
        """Return all running processes that belong to this Flower home."""
        return processes_of(self.home)

    def server_apps(self) -> list[psutil.Process]:
        """Return the process of a simulation's ServerApp, if it is running."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if any(part.endswith("flwr-simulation") for part in process.cmdline()[:3]):
                    found.append(process)
        return found

    def kill_server_app(self) -> None:
        """Kill the ServerApp of a simulation, before other processes end.

        If its clients ended first, it would count them as failed and continue without them. Killing it loses nothing,
        because finished parts are on disk.
        """
        for process in self.server_apps():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def end_processes(self) -> None:
        """End all processes of this home, with SIGTERM and then SIGKILL, and wait for their end.

        Raises
        ------
        RuntimeError
            If processes survive SIGKILL, because they hang in the kernel. The message has their ids.
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
            raise RuntimeError(f"processes do not end: {', '.join(str(process.pid) for process in left)}")


def _without_proxy() -> dict[str, str]:
    """Return the environment's exceptions from its proxy, with this machine added.

    Flower asks its local SuperLink whether it is ready through the user's proxy, which cannot reach it.
    """
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = ",".join(filter(None, (given, "127.0.0.1", "localhost")))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def _unusable_proxies() -> list[str]:
    """Return the environment variables whose proxy Flower's HTTP client cannot use.

    The client fails on such a proxy before it looks at the exceptions: on SOCKS without the package socksio, and on
    other schemes than HTTP and SOCKS5.
    """
    names = ("http_proxy", "https_proxy", "all_proxy")
    proxies = {name: value for name, value in os.environ.items() if name.lower() in names and value}
    if not proxies:
        return []
    import httpx

    unusable = []
    for name, value in proxies.items():
        try:
            httpx.Client(proxy=value if "://" in value else f"http://{value}", trust_env=False).close()
        except (ImportError, ValueError, httpx.InvalidURL):
            unusable.append(name)
    return unusable


def processes_of(home: Path) -> list[psutil.Process]:
    """Return all running processes, without this one, whose ``FLWR_HOME`` is the given folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
    return found


def _adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends, so that this process can reap them (Linux only).

    Flower's SuperLink is such an orphan. Otherwise process 1 becomes its parent. In many containers process 1 reaps no
    children, and the SuperLink and its children would stay as zombies.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap_orphans() -> None:
    """Reap adopted processes that have ended. They are the children whose session is not that of this process."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, OSError):
            if child.status() == psutil.STATUS_ZOMBIE and os.getsid(child.pid) != os.getsid(0):
                os.waitpid(child.pid, os.WNOHANG)


def _free_ports(count: int) -> list[int]:
    """Return different ports of the local machine on which no program listens at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
