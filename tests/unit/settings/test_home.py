"""A user without a home directory or without a name, as in a container under an arbitrary user number."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedmitr_flwr.settings import SettingsError, home
from fedmitr_flwr.settings.home import ensure_home, expand

# The list of users has no entry for anybody.
NOBODY = """
import pwd
def unknown(*_):
    raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = unknown
"""
SHOW = "import fedmitr_flwr, os, getpass, pathlib; print(os.environ['HOME'], getpass.getuser(), pathlib.Path.home())"


def run_as_nobody(program: str, temporary: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "FEDMITR_CACHE")
    kept = {key: value for key, value in os.environ.items() if key not in names}
    return subprocess.run(
        [sys.executable, "-c", NOBODY + program],
        env={**kept, "TMPDIR": str(temporary), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("home_of_root", [None, "/nonexistent", ""])
def test_a_private_home_and_a_name_are_made_if_there_are_none(tmp_path: Path, home_of_root: str | None) -> None:
    given = {} if home_of_root is None else {"HOME": home_of_root}
    result = run_as_nobody(SHOW, tmp_path, **given)
    made = tmp_path / f"fedmitr-home-{os.getuid()}"
    assert result.stdout.split() == [str(made), f"user-{os.getuid()}", str(made)], result.stderr
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert run_as_nobody(SHOW, tmp_path, **given).stdout == result.stdout


def test_a_usable_home_and_a_name_are_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    result = run_as_nobody(SHOW, tmp_path, HOME=str(tmp_path / "mine"), USER="ada")
    assert result.stdout.split() == [str(tmp_path / "mine"), "ada", str(tmp_path / "mine")], result.stderr


@pytest.mark.parametrize("command", [["doctor"], ["settings"], ["split", "PARTS", "--set", "data.source=mnist-5k"]])
def test_commands_start_without_a_home(tmp_path: Path, command: list[str]) -> None:
    arguments = ["fedmitr", *(str(tmp_path / "parts") if word == "PARTS" else word for word in command)]
    result = run_as_nobody(f"import sys; sys.argv = {arguments}; from fedmitr_flwr.cli import main; main()", tmp_path)
    assert "Traceback" not in result.stderr
    assert result.returncode == 0 or command == ["doctor"], result.stderr
    assert not (Path.cwd() / "~").exists()


def test_a_home_that_others_can_read_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(home.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "fresh"))
    monkeypatch.setenv("HOME", "/nonexistent")
    (tmp_path / f"fedmitr-home-{os.getuid()}").mkdir()
    (tmp_path / f"fedmitr-home-{os.getuid()}").chmod(0o777)
    ensure_home()
    assert os.environ["HOME"] == str(tmp_path / "fresh")


def test_a_home_that_cannot_be_written_is_kept_if_it_has_caches_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(home.os, "access", lambda path, mode: mode == os.R_OK and Path(path).exists())
    monkeypatch.setenv("HOME", str(tmp_path / "mine"))
    (tmp_path / "mine" / ".cache").mkdir(parents=True)
    ensure_home()
    assert os.environ["HOME"] == str(tmp_path / "mine")
    (tmp_path / "mine" / ".cache").rmdir()
    ensure_home()
    assert os.environ["HOME"] == str(tmp_path / f"fedmitr-home-{os.getuid()}")


def test_the_home_of_an_unknown_user_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/x") == tmp_path / "x"
    with pytest.raises(SettingsError, match=r'run.output = "~nonesuch/x": begins with ~, but no such user'):
        expand("~nonesuch/x", "run.output")


def test_a_file_whose_name_begins_with_a_tilde_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~nonesuch.png").touch()
    assert expand("~nonesuch.png") == Path("~nonesuch.png")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y", "a\0b"])
def test_a_path_that_cannot_be_used_is_one_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=r"run.output = .*: cannot be used as a path: "):
        expand(tmp_path / name, "run.output")
    assert expand(tmp_path / "missing" / "below") == tmp_path / "missing" / "below"
