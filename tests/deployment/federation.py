"""A federation on the hosts of a lab, as docs/deployment.md sets one up."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import psutil

from tests.deployment.lab import BIN, SERVER_NAME, SITES, Lab, wait_for
from tests.pages import ROOT, documented

UNITS = ROOT / "docker" / "systemd"
# The name of the operator's connection, and ports of the server.
CONNECTION = "federation"
FLEET, CONTROL = 9092, 8000


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
        log = self.lab.log("server", "superlink")
        before = log.stat().st_size if log.exists() else 0
        self.start_unit("server", "superlink")
        ready = b"Application startup complete"
        wait_for(lambda: ready in log.read_bytes()[before:], 240, f"{ready!r} in {log}")

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
        """Wait until a site's ClientApp process, which Flower starts for a message, has used some CPU time."""

        def training() -> bool:
            children = psutil.Process(self.lab.processes[f"supernode-{site}"].pid).children(recursive=True)
            clients = [child for child in children if any("flwr-clientapp" in part for part in child.cmdline())]
            return any(sum(child.cpu_times()[:2]) > 5 for child in clients)

        wait_for(training, seconds, f"training at {site}")

    def configure(self, host: str, port: int) -> None:
        """Give a host the documented configuration of Flower's commands, for a port of the server."""
        home = self.lab.folder / host / "flower"
        home.mkdir(parents=True, exist_ok=True)
        places = {"/home/operator/federation": str(self.pki), ":8000": f":{port}"}
        (home / "config.toml").write_text(documented("connection", **places))

    def metrics(self, name: str) -> dict[str, Any]:
        """What a run has written at its end."""
        result: dict[str, Any] = json.loads((self.outputs / name / "metrics.json").read_text())
        return result


def finish(process: subprocess.Popen[str], seconds: float = 900) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def refusal(federation: Federation, *arguments: str, host: str = "stranger") -> str:
    """Run a SuperNode that should be turned away, and return what it says."""
    result = federation.lab.run(host, "flower-supernode", "--superlink", f"{SERVER_NAME}:{FLEET}", *arguments)
    assert result.returncode != 0, result.stdout
    return " ".join(result.stdout.split())
