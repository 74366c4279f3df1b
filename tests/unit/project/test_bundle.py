"""`flwr build` accepts the app and the example as bundles of format 1, with every version of Flower we allow."""

from __future__ import annotations

import tomllib
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.cli.utils import collect_files, validate_project_name
from packaging.requirements import Requirement

from fedmitr_flwr.launch.app_copy import stage_app
from tests.pages import ROOT

EXAMPLE = ROOT / "examples" / "own-flower-app"
APPS = pytest.mark.parametrize("app", [ROOT, EXAMPLE], ids=["fedmitr", "example"])


def pyproject(app: Path) -> dict[str, Any]:
    return tomllib.loads((app / "pyproject.toml").read_text("utf-8"))


def flower(app: Path) -> Requirement:
    (found,) = [need for need in map(Requirement, pyproject(app)["project"]["dependencies"]) if need.name == "flwr"]
    return found


@APPS
def test_flower_packs_the_app_in_format_1(app: Path, tmp_path: Path) -> None:
    content, metadata = build_fab_from_files(collect_files(stage_app(app, tmp_path / "app")))
    assert metadata.fab_format_version == 1
    assert (metadata.flwr_version_min, metadata.flwr_version_target) == ("1.41", "1.42.0")
    with zipfile.ZipFile(BytesIO(content)) as bundle:
        assert bundle.read("LICENSE") == (ROOT / "LICENSE").read_bytes()


@APPS
def test_the_supported_versions_of_flower_are_1_41_and_1_42(app: Path) -> None:
    tried = ["1.40.0", "1.41.0", "1.41.9", "1.42.0", "1.42.9", "1.43.0"]
    assert [version for version in tried if version in flower(app).specifier] == tried[1:-1]


def test_flower_can_build_the_example_in_its_own_folder() -> None:
    validate_project_name(EXAMPLE.name, "the folder's name")  # `flwr build` refuses an underscore
