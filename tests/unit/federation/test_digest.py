"""The digest names the code that runs: stable, and different as soon as any of it differs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedmitr_flwr.federation.code_digest import PACKAGES, CodeMismatchError, check_digest, code_digest, package_folder

PRINT_DIGEST = (
    "from fedmitr_flwr.federation.code_digest import code_digest; import sys; sys.stdout.write(code_digest())"
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy the three packages to where a bundle might be installed."""
    for package in PACKAGES:
        shutil.copytree(package_folder(package), tmp_path / package)
    return tmp_path


def digest_of(folder: Path) -> str:
    # The copy comes first on the path; -P keeps the working directory off it.
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {PRINT_DIGEST}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout


def test_the_same_code_elsewhere_has_the_same_digest(copy: Path) -> None:
    assert digest_of(copy) == code_digest()


def test_files_that_the_bundle_drops_do_not_count(copy: Path) -> None:
    (copy / "fedmitr_flwr" / "py.typed").unlink(missing_ok=True)
    (copy / "fedmitr_flwr" / "test_something.py").write_text("x = 1\n")
    (copy / "fedmitr_flwr" / "notes.txt").write_text("x")
    assert digest_of(copy) == code_digest()


@pytest.mark.parametrize("package", PACKAGES)
def test_one_changed_character_changes_the_digest(copy: Path, package: str) -> None:
    file = copy / package / ("atomic.py" if package == "fedmitr_flwr" else "app.py")
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    assert digest_of(copy) != code_digest()


def test_a_renamed_file_and_a_new_file_change_the_digest(copy: Path) -> None:
    (copy / "client_app" / "more.py").write_text("")
    added = digest_of(copy)
    (copy / "client_app" / "more.py").rename(copy / "client_app" / "less.py")
    assert len({code_digest(), added, digest_of(copy)}) == 3


def test_other_code_is_an_error_that_names_both_digests_and_the_place() -> None:
    assert check_digest(code_digest()) == code_digest()
    with pytest.raises(CodeMismatchError) as error:
        check_digest("0123456789abcdef")
    message = str(error.value)
    assert "the server runs 0123456789ab," in message
    assert f"this client runs {code_digest()[:12]}" in message
    assert str(package_folder("client_app")) in message
