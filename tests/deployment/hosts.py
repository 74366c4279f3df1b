"""A federation on several hosts that are network namespaces of this machine, as docs/deployment.md sets one up."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import psutil

from tests.pages import ROOT, documented

UNITS = ROOT / "docker" / "systemd"
BIN = Path(sys.executable).parent
TOOLS = Path(os.environ.get("FEDMITR_ENGINE_TOOLS", ROOT.parent / "shared" / "tools"))
SITES = ("north", "south", "east")
HOSTS = ("server", "operator", *SITES, "west", "stranger")
# As docs/deployment.md has them, so that its commands run as they stand there.
CONNECTION, NET, SERVER_NAME = "federation", "192.0.2", "fl.example.org"
FLEET, CONTROL = 9092, 8000
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


@dataclass
class Federation:
    """Server, gate and three sites in a lab, TLS and authenticated.

    Attributes
    ----------
    data
        Folders with the sites' images, as `fedmitr split` makes them.
    nodes
        The node id of each site that is registered.
    """

    lab: Lab
    data: Path
    nodes: dict[str, str] = field(default_factory=dict)

    @property
    def pki(self) -> Path:
        """The operator's folder of keys and certificates."""
        return self.lab.folder / "operator" / "federation"

    @property
    def outputs(self) -> Path:
        """Where the server keeps runs."""
        return self.lab.folder / "server" / "lib" / "runs"

    def documented(self, host: str, name: str, **places: str) -> str:
        """Run a block of docs/deployment.md on a host, as it stands there but for the host's own folders."""
        return self.lab.output(host, "bash", "-euo", "pipefail", "-c", self.localised(host, documented(name, **places)))

    def start_superlink(self) -> None:
        self.start_unit("server", "superlink")
        self.wait_log("server", "superlink", "Application startup complete")

    def start_server(self) -> None:
        self.install("server", "server", "ca.crt")
        self.start_superlink()
        self.start_unit("server", "serverapp")
        configuration = (UNITS / "fedmitr-gate.conf").read_text()
        (self.lab.folder / "server" / "etc" / "fedmitr-gate.conf").write_text(self.localised("server", configuration))
        self.start_unit("server", "gate")

    def start_site(self, site: str, *, name: str | None = None, data: Path | None = None) -> None:
        """Start a site's unit; with a name it gives itself another one than its own."""
        self.install(site, f"{site}/node.key", f"{site}/executor.secret", "ca.crt")
        settings = documented("site-env")
        if data is None:  # the part that this client would have in a simulation
            number = SITES.index(site)
            data = self.data / f"site-{number}" / "images.npz"
            settings = settings.replace("data-path", f"partition-id={number} num-partitions={len(SITES)} data-path")
        settings = settings.replace('"north"', f'"{name or site}"').replace('"/srv/images"', f'"{data}"')
        (self.lab.folder / site / "etc" / "site.env").write_text(settings)
        self.start_unit(site, "site", f"supernode-{site}")

    def install(self, host: str, *names: str) -> None:
        """Copy what `fedmitr certs` made to a host's /etc/fedmitr, as the operator does."""
        etc = self.lab.folder / host / "etc"
        for name in names:
            source = self.pki / name
            if source.is_dir():
                shutil.copytree(source, etc / name, dirs_exist_ok=True)
            else:
                etc.mkdir(exist_ok=True)
                shutil.copy(source, etc / source.name)

    def localised(self, host: str, text: str) -> str:
        """Turn the places of a real host into those of a host of the lab."""
        folder = self.lab.folder / host
        places = {
            "/opt/fedmitr/bin": str(BIN),
            "/etc/fedmitr": str(folder / "etc"),
            "/var/lib/fedmitr": str(folder / "lib"),
            "/var/cache/fedmitr": str(folder / "cache"),
            "/run/fedmitr-gate": str(folder / "run"),
        }
        for place, local in places.items():
            Path(local).mkdir(exist_ok=True)
            text = text.replace(place, local)
        return text

    def start_unit(self, host: str, unit: str, name: str | None = None) -> None:
        """Start what a systemd unit starts, with its environment."""
        text = self.localised(host, (UNITS / f"fedmitr-{unit}.service").read_text().replace("\\\n", " "))
        settings = [line.partition("=")[::2] for line in text.splitlines() if "=" in line and not line.startswith("#")]
        environment = [pair for key, value in settings if key == "Environment" for pair in shlex.split(value)]
        for file in (value for key, value in settings if key == "EnvironmentFile"):
            lines = Path(file).read_text().splitlines()
            environment += [part for line in lines if not line.startswith("#") for part in shlex.split(line)]
        variables = dict(pair.split("=", 1) for pair in environment)
        (command,) = (value for key, value in settings if key == "ExecStart")
        # systemd takes a ${VARIABLE} for one argument, whatever is in it.
        arguments = [Template(part).substitute(variables) for part in shlex.split(command)]
        self.lab.start(host, name or unit, *arguments, environment=variables)

    def register(self, site: str, block: str = "register", **places: str) -> None:
        """Run the block that ends with this site's registration."""
        answer = self.documented("operator", block, **places)
        found = re.search(r'"node-id": *"?(\d+)', answer)
        assert found, answer
        self.nodes[site] = found[1]

    def online(self) -> set[str]:
        answer = self.lab.run("operator", "flwr", "supernode", "list", CONNECTION, "--format", "json")
        # A SuperLink that is starting gives none, and perhaps no JSON at all.
        _, brace, rest = answer.stdout.partition("{")
        nodes = json.loads(brace + rest or "{}").get("nodes", [])
        return {str(node["node-id"]) for node in nodes if node["status"] == "online"}

    def wait_online(self, *sites: str, seconds: float = 240) -> None:
        wanted = {self.nodes[site] for site in sites}
        wait_for(lambda: wanted <= self.online(), seconds, f"{sites} online", pause=2)

    def wait_log(self, host: str, name: str, pattern: str, seconds: float = 240) -> None:
        def found() -> bool:
            return bool(re.search(pattern, self.lab.log(host, name).read_text(errors="replace")))

        wait_for(found, seconds, f"{pattern!r} in the log of {name}")

    @contextlib.contextmanager
    def running(self, name: str, *settings: str) -> Iterator[subprocess.Popen[str]]:
        """Start a run from the operator's host; the process ends with the run."""
        roster = ",".join(f"{site}={node}" for site, node in self.nodes.items())
        given = (f"run.output={self.outputs}", f"run.name={name}", f"run.roster={roster}", *settings)
        sets = [part for setting in given for part in ("--set", setting)]
        with self.following(str(ROOT / "conf" / "quick.toml"), *sets) as process:
            yield process

    @contextlib.contextmanager
    def following(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Start `fedmitr run` on the operator's host."""
        vector, environment = self.lab.command("operator", "fedmitr", "run", CONNECTION, *arguments)
        process = subprocess.Popen(
            vector,
            cwd=self.lab.folder / "operator",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def wait_training(self, site: str, seconds: float = 300) -> None:
        """Wait until a site's ClientApp process has used some CPU time beyond its imports."""

        def training() -> bool:
            children = psutil.Process(self.lab.processes[f"supernode-{site}"].pid).children(recursive=True)
            clients = [child for child in children if any("flwr-clientapp" in part for part in child.cmdline())]
            return any(sum(child.cpu_times()[:2]) > 8 for child in clients)

        wait_for(training, seconds, f"training at {site}")


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
