"""`make docker-demo`, the compose files and the containers that they make, on a real engine."""

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deployment.conftest import Engine, Image, run_make
from tests.deployment.lab import wait_for
from tests.pages import ROOT, documented

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(3000)]
SITES = ("site-0", "site-1", "site-2")
LONG = ("train.min-steps=1500", "run.min-clients=2", "run.min-fraction=0.6", "run.deadline-seconds=120")
# Says for each address what a POST to it gives: a status, or the kind of error.
PROBE = """
import ssl, sys, urllib.error, urllib.request
context = ssl._create_unverified_context()
for address in sys.argv[1:]:
    try:
        answer = urllib.request.urlopen(urllib.request.Request(address, data=b""), timeout=5, context=context).status
    except urllib.error.HTTPError as error:
        answer = error.code
    except OSError as error:
        answer = "nothing"
    print(answer)
"""


@dataclass(frozen=True)
class Demo:
    """The demo's containers, and what `docker/demo up` printed."""

    engine: Engine
    environment: dict[str, str]
    result: subprocess.CompletedProcess[str]
    folder: Path

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def container(self, service: str) -> str:
        project = f"label=com.docker.compose.project={self.environment['COMPOSE_PROJECT_NAME']}"
        filters = ("--filter", project, "--filter", f"label=com.docker.compose.service={service}")
        return self.engine.output("ps", "--quiet", *filters).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.engine.output("inspect", self.container(service)))[0]
        return found

    def probe(self, service: str, *addresses: str) -> list[str]:
        return self.engine.output("exec", self.container(service), "python", "-c", PROBE, *addresses).split()

    def script(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "docker" / "demo"), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def start(self, name: str, *settings: str) -> subprocess.Popen[str]:
        """Start another run in the federation; the process ends with the run."""
        config = json.loads((self.outputs / "docker" / "config.json").read_text())["settings"]
        given = (f"run.name={name}", "run.output=/outputs", f"run.roster={config['run.roster']}", *settings)
        return self.follow("conf/quick.toml", *(part for setting in given for part in ("--set", setting)))

    def follow(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `fedmitr run` in the federation."""
        command = [str(ROOT / "docker" / "demo"), "run", *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def asked(self) -> list[int]:
        """How many messages each site has got so far."""
        logs = [self.engine("logs", self.container(f"supernode-{number}")) for number in range(len(SITES))]
        return [len(re.findall(r"Receiving: \w+ message", each.stdout + each.stderr)) for each in logs]

    def wait_training(self, service: str) -> None:
        """Wait until a ClientApp process, which Flower starts for a message, has used some CPU time here."""

        def training() -> bool:
            table = self.engine.output("top", self.container(service), "-eo", "pid,time,args").splitlines()
            for line in table:
                if "flwr-clientapp" in line:
                    hours, minutes, seconds = (int(part) for part in line.split()[1].split(":"))
                    return 3600 * hours + 60 * minutes + seconds >= 5
            return False

        wait_for(training, 300, f"training in {service}", pause=1)

    def metrics(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.outputs / name / "metrics.json").read_text())
        return found


@pytest.fixture(scope="module")
def demo(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    engine, folder = image.engine, tmp_path_factory.mktemp("demo")
    environment = {
        "PATH": f"{Path(engine.client).parent}:{os.environ['PATH']}",
        "FEDMITR_IMAGE": image.name,
        "FEDMITR_CONF": "conf/quick.toml",
        "FEDMITR_DEMO": str(folder / "files"),
        "FEDMITR_OUTPUTS": str(folder / "outputs"),
        "COMPOSE_PROJECT_NAME": f"fedmitr-test-{os.getpid()}",
    }
    try:
        result = run_make(_target("demo"), image.make, **environment)
        if "neither 'docker compose' nor docker-compose" in result.stderr:
            pytest.skip(result.stderr.strip())
        yield Demo(engine, {**os.environ, **environment}, result, folder)
    finally:
        down = run_make(_target("down"), image.make, **environment)
    assert down.returncode == 0, down.stderr
    left = engine.output("ps", "--all", "--quiet", "--filter", f"name={environment['COMPOSE_PROJECT_NAME']}")
    assert left == ""
    assert not (folder / "files").exists()
    assert (folder / "outputs" / "docker" / "model").exists()


def _target(block: str) -> str:
    """The target of `make` that a block of docs/deployment.md calls."""
    make, target, *_ = documented(block).split()
    assert make == "make"
    return target


def test_the_demo_prints_the_accuracies_and_where_the_model_is(demo: Demo):
    assert demo.result.returncode == 0, demo.result.stdout + demo.result.stderr
    assert demo.result.stdout.splitlines()[-1] == str(demo.outputs / "docker" / "model")
    assert (demo.outputs / "docker" / "model" / "model.safetensors").exists()
    assert demo.metrics("docker")["clients"]["accepted"] == 3
    for name in ("local models, mean", "one-shot FedAvg", "ensemble", "global model"):
        assert name in demo.result.stdout


def test_the_same_accuracies_as_in_simulation(demo: Demo, simulated: dict[str, Any]):
    assert demo.metrics("docker")["accuracy"] == pytest.approx(simulated["accuracy"], abs=0.005)


def test_all_containers_are_confined(demo: Demo):
    services = ["superlink", "gate", "serverapp"]
    services += [f"{kind}-{number}" for kind in ("supernode", "clientapp") for number in range(3)]
    for service in services:
        found = demo.inspect(service)
        host = found["HostConfig"]
        assert found["Config"]["User"].split(":")[0] not in ("", "0", "root"), service
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert host["Memory"] > 0, service
        assert host["RestartPolicy"]["Name"] == "unless-stopped", service
        assert not host["Privileged"], service
        assert not any(found["NetworkSettings"]["Ports"].values()), service
        for name in found["NetworkSettings"]["Networks"]:
            assert json.loads(demo.engine.output("network", "inspect", name))[0]["Internal"], (service, name)


def test_only_a_sites_own_executor_has_its_data_and_can_only_read_it(demo: Demo):
    holders: dict[str, list[str]] = {}
    for service in (
        "superlink",
        "gate",
        "serverapp",
        *(f"{kind}-{n}" for kind in ("supernode", "clientapp") for n in range(3)),
    ):
        for mount in demo.inspect(service)["Mounts"]:
            if mount["Source"].startswith(str(demo.folder / "files" / "data")):
                assert not mount["RW"]
                holders.setdefault(Path(mount["Source"]).name, []).append(service)
    assert holders == {f"site-{number}": [f"clientapp-{number}"] for number in range(3)}
    writing = demo.engine("exec", demo.container("clientapp-0"), "touch", "/data/x")
    assert "Read-only file system" in writing.stderr


def test_a_site_reaches_the_fleet_api_and_nothing_else(demo: Demo):
    gate = "https://gate:9092"
    forbidden = ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs")
    assert demo.probe("supernode-0", *(gate + path for path in forbidden)) == ["403"] * len(forbidden)
    assert demo.probe("supernode-0", f"{gate}/v1/fleet/pull-messages")[0] not in ("403", "404", "nothing")
    superlink, other = _address(demo, "superlink"), _address(demo, "supernode-1")
    elsewhere = (f"https://{superlink}:8000/health", f"http://{other}:9094/health", "http://192.0.2.1/")
    assert demo.probe("supernode-0", *elsewhere) == ["nothing"] * 3
    assert demo.probe("clientapp-0", *elsewhere, f"https://{_address(demo, 'gate')}:9092/health") == ["nothing"] * 4


def _address(demo: Demo, service: str) -> str:
    networks = demo.inspect(service)["NetworkSettings"]["Networks"]
    return str(next(iter(networks.values()))["IPAddress"])


def test_all_become_healthy(demo: Demo):
    for service in ("superlink", "serverapp", "supernode-0", "clientapp-0"):
        wait_for(lambda service=service: demo.inspect(service)["State"]["Health"]["Status"] == "healthy", 240, service)  # type: ignore[misc]


@pytest.mark.parametrize("service", ["clientapp-0", "supernode-1"])
def test_a_container_of_a_site_restarts_in_training(demo: Demo, service: str):
    with demo.start(service, *LONG) as process:
        demo.wait_training(service.replace("supernode", "clientapp"))
        demo.engine.output("restart", "--time", "2", demo.container(service))
        output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    clients = demo.metrics(service)["clients"]
    assert clients["accepted"] >= 2, output
    assert clients["accepted"] + clients["failed"] == 3, output


def test_the_superlink_restarts_in_training(demo: Demo):
    with demo.start("superlink", *LONG) as process:
        demo.wait_training("clientapp-2")
        demo.engine.output("restart", "--time", "2", demo.container("superlink"))
        output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert demo.metrics("superlink")["clients"]["accepted"] == 3, output


def test_a_run_goes_on_after_its_serverapp_was_killed_in_inversion(demo: Demo):
    directory = demo.outputs / "killed"
    checkpoints = directory / "checkpoints" / "round-1"
    slow = ("inversion.images=100", "inversion.iterations=200", "run.checkpoint-seconds=0")
    with demo.start("killed", *slow) as process:
        wait_for(lambda: any(checkpoints.glob("inversion-*.safetensors")), 600, "inversion")
        container = demo.container("serverapp")
        demo.engine.output("kill", container)
        done = sorted(path.name for path in checkpoints.glob("inversion-*"))
        assert len(done) < 5, "inversion was over already"
        demo.engine.output("start", container)
        output, _ = process.communicate(timeout=900)
    assert process.returncode == 1, output
    assert not (directory / "model").exists()
    uploads = {path: path.stat().st_mtime_ns for path in directory.glob("uploads/round-1/*.safetensors")}
    assert len(uploads) == 3
    asked = demo.asked()
    assert min(asked) > 0
    resume = shlex.split(documented("resume", **{"/var/lib/fedmitr/runs/leaves-1": "/outputs/killed"}))
    assert resume[:3] == ["fedmitr", "run", "federation"]
    with demo.follow(*resume[3:]) as process:
        output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert demo.asked() == asked
    assert {path: path.stat().st_mtime_ns for path in uploads} == uploads
    assert "all uploads of round 1 are already stored" in output
    assert demo.metrics("killed")["clients"]["accepted"] == 3
    assert (directory / "model" / "model.safetensors").exists()


def test_a_failed_run_is_told_by_the_exit_code(demo: Demo):
    with demo.start("too-few", "run.min-clients=4", "run.wait-nodes-seconds=5") as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output
    assert "run.min-clients = 4" in output


def test_a_second_demo_says_that_there_is_one(demo: Demo):
    start = time.monotonic()
    result = demo.script("up")
    assert result.returncode == 1
    assert "make docker-down" in result.stderr
    assert time.monotonic() - start < 10


def test_the_files_for_a_gpu_and_for_other_machines_fit_the_first(demo: Demo):
    compose = ["docker", "compose"] if demo.engine("compose", "version").returncode == 0 else ["docker-compose"]
    for extra in ("compose.gpu.yml", "compose.publish.yml"):
        files = [part for name in ("compose.yml", extra) for part in ("--file", str(ROOT / "docker" / name))]
        result = subprocess.run(
            [*compose, *files, "config"], env=demo.environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert ("nvidia" if "gpu" in extra else "9092") in result.stdout
