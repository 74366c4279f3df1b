"""`fedmitr run`, against a stand-in for `flwr` that behaves like Flower 1.41 where it matters."""

import json
import stat
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedmitr_flwr.cli import app
from fedmitr_flwr.launch import deploy

ROOT = Path(__file__).resolve().parents[3]

# Each call takes the next entry of its command from a list, the last one again and again.
FAKE_FLWR = """\
#!{python}
import json, shutil, sys
from pathlib import Path

folder, command = Path({folder!r}), sys.argv[1]
if command == "run":
    shutil.copy(sys.argv[sys.argv.index("--run-config") + 1], folder / "run.toml")
    shutil.copy(Path(sys.argv[2]) / "pyproject.toml", folder / "app.toml")
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
answers = json.loads((folder / "answers.json").read_text())
print(answers[command][0])
if len(answers[command]) > 1:
    answers[command].pop(0)
    (folder / "answers.json").write_text(json.dumps(answers))
"""


def listing(status: str, details: str = "N/A") -> str:
    return json.dumps({"success": True, "runs": [{"run-id": "7", "status": status, "status-details": details}]})


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "flwr"
    program.write_text(FAKE_FLWR.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(deploy, "bin_dir", lambda: tmp_path)
    monkeypatch.setattr(deploy, "_PAUSE_SECONDS", 0.0)
    return tmp_path


def answer(folder: Path, **answers: list[str]) -> None:
    defaults = {"run": ["Successfully started run 7"], "log": ["one\ntwo"], "ls": [listing("finished:completed")]}
    (folder / "answers.json").write_text(json.dumps({**defaults, **answers}))


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["run", "federation", "--patience", "0", *arguments])
    return result.exit_code, result.output


def test_a_completed_run_ends_with_0_and_got_its_settings(flower: Path):
    answer(flower)
    code, output = invoke(str(ROOT / "conf" / "quick.toml"), "--set", "run.output=runs", "--set", "run.seed=7")
    assert code == 0, output
    sent = tomllib.loads((flower / "run.toml").read_text())
    assert sent["run"]["seed"] == 7
    assert sent["data"]["source"] == "digits"
    assert sent["run"]["output"] == "runs"  # the server's, so it isn't made absolute here
    command, _, federation = json.loads((flower / "calls").read_text().splitlines()[0])[:3]
    assert (command, federation) == ("run", "federation")
    assert (flower / "app.toml").read_text() == (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("status", ["finished:failed", "finished:stopped"])
def test_a_failed_run_ends_with_1_and_says_why(flower: Path, status: str):
    answer(flower, ls=[listing(status, "the cause")])
    code, output = invoke()
    assert code == 1
    assert f"run 7 is {status}: the cause" in output


def test_the_log_goes_on_where_it_broke_off(flower: Path):
    log = ["Starting logstream for run_id `7`\none\ntwo", "one\ntwo\nthree", "one\ntwo\nthree\nfour"]
    answer(flower, log=log, ls=[listing("running"), listing("running"), listing("finished:completed")])
    code, output = invoke()
    assert code == 0
    lines = output.splitlines()
    assert lines[lines.index("one") :] == ["one", "two", "three", "four"]


def test_a_silent_superlink_is_waited_for(flower: Path):
    answer(flower, ls=["connection refused", listing("finished:completed")])
    result = CliRunner().invoke(app, ["run", "federation", "--patience", "60"])
    assert result.exit_code == 0, result.output


def test_a_superlink_that_stays_silent_is_given_up(flower: Path):
    answer(flower, ls=["connection refused"])
    code, output = invoke()
    assert code == 1
    assert "has not answered for 0 seconds" in output


def test_a_run_that_is_refused_says_why(flower: Path):
    answer(flower, run=["Error: no such connection"])
    code, output = invoke()
    assert code == 1
    assert "the run was not started: Error: no such connection" in output


def test_a_superlink_that_flower_does_not_know_is_bad_input_in_one_line(flower: Path):
    made = "Flower configuration not found. Created default configuration at x"
    error = "│ SuperLink connection 'federation' not found in the Flower │\n│ configuration file (x). │"
    answer(flower, run=[f"{made}\n╭─ Error ─────╮\n{error}\n╰───╯"])
    code, output = invoke()
    assert code == 2
    (line,) = output.strip().splitlines()
    assert line.startswith('fedmitr: SUPERLINK = "federation": is no SuperLink connection: SuperLink connection')
    assert "│" not in line
    assert "Created default" not in line


def test_bad_settings_are_told_before_anything_is_sent(flower: Path):
    answer(flower)
    code, output = invoke("--set", "run.seeds=7")
    assert code == 2
    assert "run.seeds" in output
    assert not (flower / "calls").exists()
