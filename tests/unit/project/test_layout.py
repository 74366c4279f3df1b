"""The house keeps its order: rooms import only what lies below them, and no folder grows into a heap."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = ROOT / "fedmitr_flwr"
PACKAGES = ("fedmitr_flwr", "client_app", "server_app")
MOST_ENTRIES = 12


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages and the contracts, to break them."""
    folder = tmp_path_factory.mktemp("house")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("settings/run.py", "from fedmitr_flwr.data.spec import ImageSpec", "The rooms stand in the order of the data"),
        ("stages/density.py", "import flwr.app", "The method knows neither Flower nor files"),
        ("pipeline/steps.py", "from flwr.app import Message", "Flower's messages stay in federation"),
        ("data/spec.py", "from fedmitr_flwr.data.load import load_spec", "No circles between neighbours"),
    ],
)
def test_a_wrong_import_breaks_a_contract(copy: Path, file: str, line: str, broken: str):
    path = copy / "fedmitr_flwr" / file
    right = path.read_text("utf-8")
    path.write_text(f"{right}\n{line}\n", "utf-8")
    try:
        result = lint_imports(copy)
    finally:
        path.write_text(right, "utf-8")
    assert result.returncode == 1, result.stdout + result.stderr
    assert [said for said in result.stdout.splitlines() if said.startswith(broken) and "BROKEN" in said], result.stdout


def test_all_contracts_are_kept(copy: Path):
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 kept, 0 broken" in result.stdout


def test_no_module_lies_in_the_root_of_the_package():
    assert {path.name for path in LIBRARY.glob("*.py")} == {"__init__.py", "version.py"}


@pytest.mark.parametrize(
    "folder", [path for path in LIBRARY.rglob("*") if (path / "__init__.py").is_file()], ids=lambda path: path.name
)
def test_no_folder_holds_more_than_twelve_entries(folder: Path):
    entries = [path.name for path in folder.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_no_benchmark_imports_itself_through_another():
    graph = grimp.build_graph("benchmarks", "fedmitr_flwr", cache_dir=None)
    own = [module for module in graph.modules if module.startswith("benchmarks.")]
    pairs = [(module, other) for module in own for other in graph.find_modules_directly_imported_by(module)]
    circles = [(module, other) for module, other in pairs if graph.chain_exists(other, module)]
    assert len(own) > 15
    assert circles == []
