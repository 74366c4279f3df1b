"""Hosts on one switch that are network namespaces of this machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.pages import ROOT

BIN = Path(sys.executable).parent
TOOLS = Path(os.environ.get("FEDMITR_ENGINE_TOOLS", ROOT.parent / "shared" / "tools"))
SITES = ("north", "south", "east")
HOSTS = ("server", "operator", *SITES, "west", "stranger")
# As docs/deployment.md has them, so that its commands run as they stand there.
NET, SERVER_NAME = "192.0.2", "fl.example.org"
_NAMES = Path("/etc/netns")


def missing() -> str:
    """Say what this machine lacks for such a lab; empty if nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not (TOOLS / "netns-lab").exists():
        return f"there is no {TOOLS / 'netns-lab'}"
    tools = [tool for tool in ("ip", "iptables", "nginx") if shutil.which(tool) is None]
    if tools:
        return f"there is no {' and no '.join(tools)}"
    probe = ["unshare", "--net", "ip", "link", "add", "probe", "type", "bridge"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"no network namespace can be made here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Lab:
    """Hosts on one switch.

    Attributes
    ----------
    folder
        Each host has a folder of its own in it, for logs and Flower's home.
    prefix
        Of the hosts' names, so that two labs don't meet.
    """

    folder: Path
    prefix: str = field(default_factory=lambda: f"fm{os.getpid() % 10000}")
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def netns(self, *arguments: str) -> str:
        environment = {**os.environ, "LAB": self.prefix, "NET": NET}
        command = [str(TOOLS / "netns-lab"), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def address(self, host: str) -> str:
        return self.netns("addr", host).strip()

    def command(self, host: str, *command: str) -> tuple[list[str], dict[str, str]]:
        """How a command runs on a host: the vector, and an environment with that host's own Flower home."""
        home = self.folder / host
        home.mkdir(exist_ok=True)
        program = command[0] if "/" in command[0] else str(shutil.which(command[0], path=f"{BIN}:{os.environ['PATH']}"))
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("FLWR_")},
            "FLWR_HOME": str(home / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        return ["ip", "netns", "exec", f"{self.prefix}-{host}", program, *command[1:]], environment

    def start(self, host: str, name: str, *command: str, environment: Mapping[str, str]) -> None:
        """Start a service on a host; its output goes to a log of that name."""
        vector, common = self.command(host, *command)
        log = self.log(host, name)
        with log.open("ab") as output:
            self.processes[name] = subprocess.Popen(
                vector,
                cwd=log.parent,
                env={**common, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, host: str, *command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command on a host and return what it prints, errors included."""
        vector, environment = self.command(host, *command)
        # Not through a pipe: a SuperNode that is turned away leaves a child behind, which would hold it open.
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.run(
                vector,
                cwd=self.folder / host,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
            output.seek(0)
            return subprocess.CompletedProcess(vector, process.returncode, output.read())

    def output(self, host: str, *command: str) -> str:
        result = self.run(host, *command)
        assert result.returncode == 0, f"{command}: {result.stdout}"
        return result.stdout

    def log(self, host: str, name: str) -> Path:
        return self.folder / host / f"{name}.log"

    def end(self, name: str, number: signal.Signals = signal.SIGTERM, *, children: bool = True) -> int:
        """End a service, and by default what it started; return its exit code."""
        process = self.processes.pop(name)
        family = [psutil.Process(process.pid)] if process.poll() is None else []
        family += [child for parent in family for child in parent.children(recursive=True)] if children else []
        for send in (lambda each: each.send_signal(number), psutil.Process.kill):
            for each in family:
                with contextlib.suppress(psutil.Error):
                    send(each)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=20)
        raise AssertionError(f"{name} does not end")

    def __enter__(self) -> "Lab":
        self.netns("up", *HOSTS)
        for host in HOSTS:
            (self.folder / host).mkdir(parents=True, exist_ok=True)
            # `ip netns exec` shows a host this file as its /etc/hosts.
            names = _NAMES / f"{self.prefix}-{host}"
            names.mkdir(parents=True)
            (names / "hosts").write_text(f"127.0.0.1 localhost\n{self.address('server')} {SERVER_NAME}\n")
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.end(name)
        for host in HOSTS:
            pids = subprocess.run(
                ["ip", "netns", "pids", f"{self.prefix}-{host}"], capture_output=True, text=True, check=False
            ).stdout.split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            shutil.rmtree(_NAMES / f"{self.prefix}-{host}", ignore_errors=True)
        self.netns("down")


def wait_for(condition: Callable[[], bool], seconds: float, what: str = "", pause: float = 0.5) -> None:
    """Wait until a condition holds; fail with its name when it doesn't in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (OSError, psutil.Error):
            pass
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(pause)
