"""The documentation: every code block is run or says why not, every link leads somewhere, every command has help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import fedmitr_flwr
from fedmitr_flwr.cli import app
from tests.pages import FENCED, ROOT, Block, blocks
from tests.unit.results.finished import make_run

# Pages whose blocks another test owns.
ELSEWHERE = {"settings.md": "generated; tests/unit/settings/test_settings.py"}
PAGES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    if path.name not in ELSEWHERE
)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_code_block_is_run_or_says_why_not(block: Block) -> None:
    if block.kind in ("mermaid", ""):
        return
    if block.deployment:
        tests = [path.read_text("utf-8") for path in (ROOT / "tests" / "deployment").glob("*.py")]
        assert any(f'"{block.deployment}"' in text for text in tests), "no test asks for it"
        return
    reason = block.mark.removeprefix("not run: ")
    assert block.mark in ("run", "run, integration") or (block.mark.startswith("not run: ") and len(reason) > 10)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_fenced_blocks(page: Path) -> None:
    prose = FENCED.sub("", page.read_text("utf-8"))
    loose = re.findall(
        r"^(?: {4,}|\t)(?:\$ )?(?:\.venv/bin/)?(?:fedmitr|flwr|make|pip|python3?|docker) .*$", prose, re.M
    )
    assert loose == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "bash"], ids=lambda block: block.name)
def test_commands_and_options_in_a_block_exist(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if not words or Path(words[0]).name != "fedmitr" or words[1].startswith("--"):
            continue
        assert words[1] in COMMANDS, line
        known = {option for parameter in COMMANDS[words[1]].params for option in parameter.opts}
        assert {word.split("=")[0] for word in words[2:] if word.startswith("-")} <= known | {"--help"}, line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's surroundings: conf, two finished runs, an image."""
    folder = tmp_path_factory.mktemp("docs")
    make_run(folder / "outputs", "quick")
    make_run(folder / "outputs", "other", **{"distill.steps": 25})
    make_run(folder / "outputs", "demo")
    (folder / "conf").symlink_to(ROOT / "conf")
    Image.new("L", (8, 8), 128).save(folder / "digit.png")
    return folder


def run_block(block: Block, place: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euc", block.text] if block.kind == "bash" else [sys.executable, "-c", block.text]
    result = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == "run"], ids=lambda block: block.name)
def test_a_code_block_runs(block: Block, place: Path) -> None:
    if "--onnx" in block.text:
        pytest.importorskip("onnxscript", reason="the onnx packages are not installed")
    run_block(block, place)


@pytest.mark.integration
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == "run, integration"], ids=lambda block: block.name)
def test_a_code_block_that_starts_flower_runs(block: Block, tmp_path: Path) -> None:
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    run_block(block, tmp_path)
    assert (tmp_path / "outputs" / "quick" / "report.html").is_file()


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_command_has_help_that_says_how_it_exits(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"] if name else ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert len(result.stdout) > 200
    assert "\\[" not in result.stdout
    assert "Positional arguments:" not in result.stdout
    bare = re.findall(r"^  (?:RUN|IMAGE\.\.\.|RUN\.\.\.|\[CONF\]) *(?:\[required\])?$", result.stdout, re.M)
    assert bare == [], "an argument without a description"
    if name:
        assert "Exit code: " in result.stdout
        assert f"fedmitr {name}" in (ROOT / "docs" / "commands.md").read_text()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        assert "fonts.googleapis.com" not in page.read_text("utf-8"), page


def test_links_between_files_of_the_checkout_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_library_page_names_everything_public() -> None:
    page = (ROOT / "docs" / "library.md").read_text("utf-8")
    missing = [name for name in fedmitr_flwr.__all__ if f"`{name}`" not in page and name != "__version__"]
    assert missing == []


def faq_errors() -> list[str]:
    return re.findall(r"^\*\*`(.+)`\*\*$", (ROOT / "docs" / "faq.md").read_text("utf-8"), re.M)


@pytest.mark.parametrize("error", faq_errors())
def test_an_error_that_the_questions_explain_is_one_that_the_code_raises(error: str) -> None:
    code = " ".join(path.read_text("utf-8") for path in (ROOT / "fedmitr_flwr").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message goes on on the next line
    phrases = [part.strip() for part in re.split(r"\.\.\.|[=:;\"]", error)]
    assert any(len(phrase) > 8 and phrase in code for phrase in phrases), phrases
