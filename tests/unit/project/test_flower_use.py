"""What we use of Flower: nothing deprecated, public names where there are any, and no download at run time."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from flwr.superlink.cli.flower_superlink import _runtime_dependency_install_default

from fedmitr_flwr.launch.private_flower import PrivateFlower, bin_dir
from tests.pages import ROOT

PACKAGES = ("fedmitr_flwr", "client_app", "server_app")
FOLDERS = (*PACKAGES, "benchmarks", "examples", "tests")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
# Modules that Flower documents.
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.clientapp.mod", "flwr.serverapp", "flwr.serverapp.strategy")
# What Flower 1.42 calls deprecated, in its log or in its documentation: functions and classes, then methods.
DEPRECATED = {
    *("run_simulation", "start_simulation", "start_server", "start_client", "start_numpy_client", "Driver"),
    *("RecordSet", "ParametersRecord", "MetricsRecord", "ConfigsRecord", "ServerConfig", "ServerAppComponents"),
}
DEPRECATED_METHODS = {"create_message", "create_reply", "create_error_reply"}
PROGRAMS = ("flower-superlink", "flower-supernode", "flower-superexec")
VARIABLE = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
FLAG = "--disable-runtime-dependency-installation"


def flower_imports(path: Path) -> Iterator[tuple[str, str]]:
    """Modules of Flower that a file imports, with the imported names."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flwr":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "flwr")


def test_nothing_deprecated_of_flower_is_used() -> None:
    used = {(str(path.relative_to(ROOT)), name) for path in SOURCES for _, name in flower_imports(path)}
    called = {
        (str(path.relative_to(ROOT)), node.attr)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert [(file, name) for file, name in used if name in DEPRECATED] == []
    assert [(file, name) for file, name in called if name in DEPRECATED_METHODS] == []


def test_a_name_that_flower_makes_public_is_imported_from_there() -> None:
    public = {name: module for module in PUBLIC for name in import_module(module).__all__}
    found = {(str(path.relative_to(ROOT)), module, name) for path in SOURCES for module, name in flower_imports(path)}
    wrong = [f"{file}: {name} from {module}" for file, module, name in found if module not in PUBLIC and name in public]
    assert wrong == []


def test_every_module_that_flower_does_not_document_is_on_the_page() -> None:
    page = (ROOT / "docs" / "flower.md").read_text("utf-8")
    sources = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES]
    private = {module for path in sources for module, _ in flower_imports(path) if module not in PUBLIC}
    assert {module for module in private if f"`{module}`" not in page} == set()


def test_every_test_on_the_page_exists_and_every_such_test_is_on_it() -> None:
    page = (ROOT / "docs" / "flower.md").read_text("utf-8")
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", tests, re.M))
    rows = [row for row in page.splitlines() if row.count("|") == 6]
    cells = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[5])]
    named = {name if name.startswith("test_") else f"test_flower_still_{name}" for name in cells}
    assert named - defined == set()
    assert {name for name in defined if name.startswith("test_flower_still_")} - named == set()


def commands() -> dict[str, list[list[str]]]:
    """The command lines of each program, from the systemd units and from the compose file, by where they stand."""
    found: dict[str, list[list[str]]] = {program: [] for program in PROGRAMS}
    for path in (ROOT / "docker" / "systemd").glob("*.service"):
        (line,) = re.findall(r"^ExecStart=(.*)$", path.read_text("utf-8").replace("\\\n", " "), re.M)
        program, *arguments = shlex.split(line)
        if Path(program).name in found:
            found[Path(program).name].append(arguments)
    for service in yaml.safe_load((ROOT / "docker" / "compose.yml").read_text("utf-8"))["services"].values():
        for program in set(service.get("entrypoint", [])) & set(PROGRAMS):
            found[program].append(shlex.split(service["command"]))
    return found


@cache
def options(program: str) -> dict[str, str]:
    """The options of a program and what its help says of each."""
    result = subprocess.run(
        [str(bin_dir() / program), "--help"],
        env={"COLUMNS": "100", "PATH": str(bin_dir()), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    parts = re.split(r"\n  (?=-)", result.stdout.partition("options:")[2])
    return {re.findall(r"--[\w-]+", part.split("  ")[0])[0]: " ".join(part.split()) for part in parts if "--" in part}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_options_that_a_deployment_uses_exist_and_are_not_deprecated(program: str) -> None:
    assert len(commands()[program]) >= 2, "one unit and one container at least"
    used = {argument for command in commands()[program] for argument in command if argument.startswith("--")}
    assert used <= options(program).keys()
    assert [text for option, text in options(program).items() if option in used and "deprecated" in text.lower()] == []


def test_a_deployment_installs_nothing_at_run_time() -> None:
    assert [command for command in commands()["flower-superlink"] if FLAG not in command] == []
    allowed = "--allow-runtime-dependency-installation"
    assert [command for lines in commands().values() for command in lines if allowed in command] == []
    units = [path.read_text("utf-8") for path in (ROOT / "docker" / "systemd").glob("*.service")]
    assert [text for text in units if "/bin/flower-" in text and f"{VARIABLE}=1" not in text] == []
    assert f"{VARIABLE}=1" in (ROOT / "docker" / "Dockerfile").read_text("utf-8")


def test_a_simulation_installs_nothing_at_run_time() -> None:
    with PrivateFlower() as flower:
        assert flower.environment[VARIABLE] == "1"


def test_flower_obeys_the_variable_that_turns_installation_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    assert not _runtime_dependency_install_default()
    assert "uv sync" in options("flower-superlink")[FLAG]
