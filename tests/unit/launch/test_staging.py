import os
import shutil
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from fedmitr_flwr.launch.app_copy import stage_app
from tests.pages import ROOT

HELD = ("pyproject.toml", "LICENSE", ".gitignore", "app/client.py", "app/deep/table.json", "notes.md")
LEFT = (
    ".venv/lib/module.py",
    "environment/pyvenv.cfg",
    "environment/lib/module.py",
    ".git/config.toml",
    "app/__pycache__/client.py",
    "outputs/run/config.json",
    "app/picture.png",
    "app/weights.safetensors",
)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    app = tmp_path / "app"
    for name in HELD + LEFT:
        path = app / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (app / ".gitignore").write_text("*.log\n/outputs/\n")
    os.symlink(app / "notes.md", app / "link.md")
    return app


def test_what_a_bundle_can_hold_is_copied_and_nothing_else(app: Path, tmp_path: Path) -> None:
    copy = stage_app(app, tmp_path / "copy")
    found = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert found == set(HELD)
    assert (copy / "app/client.py").read_text() == "app/client.py"


def test_flower_packs_the_same_bundle_from_the_copy(tmp_path: Path) -> None:
    build = pytest.importorskip("flwr.cli.build")
    packages = ("fedmitr_flwr", "client_app", "server_app", "conf")
    app = tmp_path / "app"
    for name in packages:
        shutil.copytree(ROOT / name, app / name)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, app / name)
    whole, staged = (
        zipfile.ZipFile(BytesIO(build.build_fab_from_disk(folder)))
        for folder in (app, stage_app(app, tmp_path / "copy"))
    )
    assert staged.namelist() == whole.namelist()
    assert all(staged.read(name) == whole.read(name) for name in whole.namelist())
