"""The container image, as an operator who trusts nobody runs it."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deployment.conftest import Image
from tests.pages import ROOT, documented

UID = 49999
# The first test waits for the build.
pytestmark = [pytest.mark.deployment, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def finished(image: Image, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The quick simulation in a hardened container, and the results it left in a folder of the host."""
    outputs = tmp_path_factory.mktemp("outputs")
    outputs.chmod(0o777)
    arguments = ("conf/quick.toml", "--clients", "3", "--output", "/outputs", "--set", "run.name=quick")
    result = image.run("simulate", *arguments, options=("--volume", f"{outputs}:/outputs"))
    assert result.returncode == 0, result.stdout + result.stderr
    return result, outputs / "quick"


def test_its_command_is_fedmitr_and_explains_itself(image: Image):
    result = image.run()
    assert result.returncode == 0, result.stderr
    assert "simulate" in result.stdout


def test_a_hardened_simulation_leaves_its_results_on_the_host(
    image: Image, finished: tuple[subprocess.CompletedProcess[str], Path]
):
    result, directory = finished
    assert result.stdout.splitlines()[-1] == "/outputs/quick"
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["clients"]["accepted"] == 3
    assert metrics["accuracy"].keys() == {"local_mean", "fedavg", "ensemble", "global"}
    assert json.loads((directory / "config.json").read_text())["digest"] == image.digest


def test_results_belong_to_the_images_user_and_everybody_may_read_them(
    finished: tuple[subprocess.CompletedProcess[str], Path],
):
    paths = [finished[1], *finished[1].rglob("*")]
    assert {path.stat().st_uid for path in paths} == {UID}
    unreadable = [path for path in paths if not path.stat().st_mode & (0o005 if path.is_dir() else 0o004)]
    assert unreadable == []


@pytest.mark.parametrize("user", ["", "12345:12345"], ids=["default-user", "any-user"])
def test_nothing_else_is_writable(image: Image, user: str):
    options = ("--user", user) if user else ()
    assert image.shell("id -u", *options).strip() == (user.partition(":")[0] or str(UID))
    writable = image.shell("find / -xdev -writable ! -type l ! -type c 2>/dev/null || true", *options).split()
    # What every Debian has.
    assert set(writable) - {"/tmp", "/var/tmp", "/run/lock"} == {"/outputs", "/cache", "/flower"}


def test_the_caches_and_flowers_home_are_where_the_environment_says(image: Image):
    assert image.shell('echo "$FEDMITR_CACHE $XDG_CACHE_HOME $FLWR_HOME $HOME"').split() == [
        "/cache",
        "/cache",
        "/flower",
        "/tmp",
    ]


def test_its_size_and_how_fast_it_starts(image: Image, measured: Callable[[str], None]):
    size = int(image.engine.output("image", "inspect", "--format", "{{.Size}}", image.name))
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert image.run("--help").returncode == 0
        seconds.append(time.monotonic() - start)
    measured(f"image: {size / 1e9:.2f} GB; `docker run fedmitr --help`: {min(seconds):.1f} s, the fastest of three")
    # With PyTorch for CUDA, which is 5.5 GB of it.
    assert size < 8e9
    assert min(seconds) < 15


def test_an_account_and_its_folder_are_made_as_documented(image: Image):
    script = documented("account") + "stat --format '%a %U %G' /etc/fedmitr; getent passwd fedmitr"
    made = image.engine.output("run", "--rm", "--user", "0", "--entrypoint", "bash", image.base, "-euc", script)
    folder, account = made.splitlines()
    assert folder == "750 fedmitr fedmitr"
    assert account.endswith(":/var/lib/fedmitr:/usr/sbin/nologin")


def test_no_build_tools_and_no_leftovers_are_inside(image: Image):
    assert image.shell("for tool in gcc cc make git; do command -v $tool; done || true") == ""
    assert image.shell("ls -d /wheels /opt/venv/bin/pip* /opt/venv/lib/*/site-packages/pip 2>/dev/null || true") == ""
    assert image.shell("ls -A /root/.cache /tmp /cache /flower /outputs 2>/dev/null | grep -v : || true").strip() == ""
    inside = set(image.shell("ls -A /app").split())
    assert inside == {"LICENSE", "README.md", "pyproject.toml", "conf", "client_app", "server_app", "fedmitr_flwr"}


def test_neither_secrets_nor_indices_are_in_the_image(image: Image):
    ours = len(_history(image, image.name)) - len(_history(image, image.base))
    told = "\n".join(_history(image, image.name)[:ours])
    environment = set(_inspect(image, image.name)["Env"]) - set(_inspect(image, image.base)["Env"])
    told += "\n".join(environment) + json.dumps(_inspect(image, image.name)["Labels"])
    assert "COPY /staged" in told
    assert image.canary not in told
    assert not re.search(r"://|index|token|password|secret|credential|PRIVATE KEY", told, re.IGNORECASE)
    places = "/app /etc /opt/venv/bin /root /var"
    assert image.shell(f"grep -rl {image.canary} {places} 2>/dev/null || true", "--user", "0") == ""


def _history(image: Image, name: str) -> list[str]:
    return image.engine.output("history", "--no-trunc", "--format", "{{.CreatedBy}} {{.Comment}}", name).splitlines()


def _inspect(image: Image, name: str) -> dict[str, list[str]]:
    config: dict[str, list[str]] = json.loads(image.engine.output("image", "inspect", name))[0]["Config"]
    return config


def test_its_labels_say_what_it_is(image: Image):
    labels = dict(_inspect(image, image.name)["Labels"])
    assert labels["org.opencontainers.image.title"] == "fedmitr"
    assert f'version = "{labels["org.opencontainers.image.version"]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("command", ["flower-superlink", "flower-supernode", "flower-superexec"])
def test_flowers_processes_start_from_the_same_image(image: Image, command: str):
    result = image.run("--version", options=("--entrypoint", command))
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\b1\.4[12]\.", result.stdout)
