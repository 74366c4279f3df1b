"""What is made once for all tests of this folder: image and federation of hosts, on a real engine and a real network.

The engine is the one that ``DOCKER_HOST`` names, else the one at the default socket. ``BASE`` and ``TORCH`` in the
environment (``make test-deployment BASE=...``) are the build's arguments of these names; without ``TORCH`` the image
gets the PyTorch that runs these tests.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fedmitr_flwr.federation.code_digest import code_digest
from tests.deployment.federation import CONTROL, Federation
from tests.deployment.lab import SITES, Lab
from tests.pages import ROOT

NAME = "fedmitr:test"
# How an operator who trusts nobody runs a container of this image.
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none")
SCRATCH = ("--tmpfs", "/tmp", "--tmpfs", "/cache", "--tmpfs", "/flower")


_MEASURED: list[str] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _MEASURED:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def measured() -> Callable[[str], None]:
    """Takes a line that is to stand at the end of pytest's report."""
    return _MEASURED.append


@dataclass(frozen=True)
class Engine:
    """A Docker client that reaches an engine and can build with BuildKit."""

    client: str

    def __call__(self, *arguments: str, timeout: float = 1200) -> subprocess.CompletedProcess[str]:
        command = [self.client, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    def output(self, *arguments: str) -> str:
        result = self(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


@dataclass(frozen=True)
class Image:
    """The image under test.

    Attributes
    ----------
    engine
        The engine that has it.
    name
        Its name and tag.
    base
        The image that it is built on.
    canary
        A secret that its build was given.
    digest
        Fingerprint of the code that went in.
    make
        Variables for `make` that name this image and build it from what is in the engine's cache.
    """

    engine: Engine
    name: str
    base: str
    canary: str
    digest: str
    make: dict[str, str]

    def run(self, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run the image's own command with arguments, hardened, in a container that is gone afterwards."""
        return self.engine("run", "--rm", *HARDENED, *SCRATCH, *options, self.name, *arguments)

    def shell(self, script: str, *options: str) -> str:
        """Run a shell script in the image and return what it prints."""
        return self.engine.output("run", "--rm", *options, "--entrypoint", "sh", self.name, "-c", script)


@pytest.fixture(scope="session")
def engine() -> Engine:
    clients = [shutil.which("docker", path=folder) for folder in os.get_exec_path()]
    found = [Engine(client) for client in clients if client]
    if not found:
        pytest.skip("there is no docker command")
    answering = [each for each in found if each("version", timeout=30).returncode == 0]
    if not answering:
        pytest.skip("no Docker engine answers: " + found[0]("version").stderr.strip()[-200:])
    for each in answering:
        if _has_buildkit(each):
            return each
    pytest.skip("no docker command here can build with BuildKit: install its buildx plugin")


def _has_buildkit(engine: Engine) -> bool:
    """Until version 22 the client brings BuildKit along, later ones leave it to a plugin."""
    major = int(engine.output("version", "--format", "{{.Client.Version}}").split(".")[0])
    return major < 23 or engine("buildx", "version").returncode == 0


@pytest.fixture(scope="session")
def image(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    canary = f"canary-{secrets.token_hex(8)}"
    secret = tmp_path_factory.mktemp("secret") / "pip.conf"
    secret.write_text(f"# {canary}\n")
    torch = os.environ.get("TORCH") or " ".join(
        f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision")
    )
    docker_args = f"--progress plain --secret id=pip,src={secret}"
    variables = {"IMAGE": NAME, "DOCKER": engine.client, "TORCH": torch, "DOCKER_ARGS": docker_args}
    before, digest = _id(engine), code_digest()
    result = run_make("docker-image", variables)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    yield Image(engine, NAME, os.environ.get("BASE") or "python:3.11-slim", canary, digest, variables)
    if before and before != _id(engine):
        # The image stays, so that the next build has its layers; the one that it replaced isn't needed.
        engine("image", "rm", before)


def run_make(target: str, variables: Mapping[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `make` in the checkout."""
    command = ["make", "--no-print-directory", target, *(f"{name}={value}" for name, value in variables.items())]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """``metrics.json`` of conf/quick.toml with three clients in a simulation on this machine."""
    output = tmp_path_factory.mktemp("simulated")
    command = [str(Path(sys.executable).parent / "fedmitr"), "simulate", "conf/quick.toml", "--clients", "3"]
    command += ["--output", str(output), "--set", "run.name=quick", "--quiet"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    metrics: dict[str, Any] = json.loads((output / "quick" / "metrics.json").read_text())
    return metrics


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("lab")
    with Lab(folder / "hosts") as lab:
        federation = Federation(lab, folder / "data")
        federation.documented("operator", "certs")
        lab.output(
            "operator", "fedmitr", "split", str(federation.data), str(ROOT / "conf" / "quick.toml"), "--clients", "3"
        )
        federation.documented("server", "firewall")
        federation.configure("operator", CONTROL)
        federation.start_server()
        federation.register("north")
        federation.register("south", north="south")
        federation.register("east", "add")
        for site in SITES:
            federation.start_site(site)
        federation.wait_online(*SITES)
        yield federation


@pytest.fixture
def whole(federation: Federation) -> None:
    """Each test begins with all services up; what an earlier one ended is started again."""
    for site in SITES:
        if f"supernode-{site}" not in federation.lab.processes:
            federation.start_site(site)
    federation.wait_online(*SITES)


def _id(engine: Engine) -> str:
    return engine("image", "inspect", "--format", "{{.Id}}", NAME).stdout.strip()
