"""The `fedmitr` command, against a stand-in for `flwr` that behaves like Flower 1.41 where it matters."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

import fedmitr_flwr
from fedmitr_flwr import cli
from fedmitr_flwr.launch import private_flower, settings_files
from fedmitr_flwr.settings import Settings, SettingsError
from fedmitr_flwr.settings import docs as settings_docs
from fedmitr_flwr.settings.docs import flatten

ROOT = Path(__file__).resolve().parents[3]

# Leaves a detached process behind as `flwr run` leaves its SuperLink, and returns 0 whatever happens.
FAKE_FLWR = """\
#!{python}
import json, os, shutil, subprocess, sys, time, tomllib
from pathlib import Path

home, record = Path(os.environ["FLWR_HOME"]), Path({record!r})
scenario = Path({scenario!r}).read_text()
if sys.argv[1] == "ls":
    status = "finished:" + ("failed" if scenario == "crashed" else "stopped" if scenario == "stopped" else "completed")
    details = "Simulation failed with exception: boom" if scenario == "crashed" else "N/A"
    print(json.dumps(dict(success=True, runs=[{{"run-id": sys.argv[3], "status": status, "status-details": details}}])))
    sys.exit(0)
file = lambda option: tomllib.loads(Path(sys.argv[sys.argv.index(option) + 1]).read_text())
config = file("--run-config")
record.write_text(json.dumps(dict(argv=sys.argv[1:], config=config, federation=file("--federation-config"),
                                  env=dict(os.environ), cwd=os.getcwd())))
tries = Path({record!r} + ".tries")
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if scenario == "slow-start" and len(tries.read_text()) < 3:
    half_made = Path(os.environ["FLWR_HOME"], "local-superlink", "state.db")
    half_made.parent.mkdir()  # fails where an earlier try has left its database
    half_made.touch()
    print("Error: Failed to start local SuperLink within 15s.")
    sys.exit(1)
if scenario == "refused":
    print("[code: 15] Invalid run configuration.")
    sys.exit(1)
command = [sys.executable, "-c", "import time; time.sleep(600)"]
left = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Successfully started run 4711")
print("\\x1b[92mINFO \\x1b[0m:      To change federation size, use the following command:")
print("a line of the log", flush=True)
run = Path(config["run"]["output"]) / config["run"]["name"]
if scenario in ("below-quorum", "crashed"):
    print("ERROR :     The run failed. " + ("QuorumError: few" if scenario == "below-quorum" else "KeyError: 3"))
    print("ERROR :     Simulation raised an exception")
    print("Traceback (most recent call last):", flush=True)
if scenario != "early-exit":
    run.mkdir(parents=True, exist_ok=True)
    states = {{"below-quorum": "failed", **dict.fromkeys(("killed", "hangs", "crashed", "stopped"), "running")}}
    status = dict(state=states.get(scenario, "completed"), error="too few" if scenario == "below-quorum" else None)
    (run / "status.json").write_text(json.dumps(status))
if scenario == "hangs":
    time.sleep(600)
"""


class Stage:
    """A place with a fake `flwr`: what it should do, and what it was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record.json"
        self.scenario = folder / "scenario"
        self.bin = folder / "bin"
        self.bin.mkdir()
        flwr = self.bin / "flwr"
        text = FAKE_FLWR.format(python=sys.executable, record=str(self.record), scenario=str(self.scenario))
        flwr.write_text(text)
        flwr.chmod(flwr.stat().st_mode | stat.S_IXUSR)

    def told(self) -> dict[str, dict[str, object]]:
        return json.loads(self.record.read_text())  # type: ignore[no-any-return]

    def home(self) -> Path:
        return Path(str(self.told()["env"]["FLWR_HOME"]))

    def left_behind(self) -> list[psutil.Process]:
        return [each for each in private_flower.processes_of(self.home()) if each.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(tmp_path)
    monkeypatch.setattr(private_flower, "bin_dir", lambda: stage.bin)
    monkeypatch.chdir(tmp_path)
    return stage


Simulate = Callable[..., Result]


@pytest.fixture
def simulate(stage: Stage) -> Simulate:
    def run(scenario: str, *arguments: str) -> Result:
        stage.scenario.write_text(scenario)
        return CliRunner().invoke(cli.app, ["simulate", *arguments])

    return run


def test_a_completed_run_ends_with_its_absolute_path_and_exit_code_0(simulate: Simulate, tmp_path: Path):
    result = simulate("completed", "--set", "run.name=mine")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(tmp_path / "outputs" / "mine")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("scenario", "error"),
    [
        ("crashed", "boom"),
        ("stopped", "finished:stopped"),
        ("below-quorum", "too few"),
        ("killed", "the ServerApp ended before"),
        ("early-exit", "the ServerApp ended before"),
        ("refused", "Flower did not start the run (flwr run ended with code 1): [code: 15] Invalid run"),
    ],
)
def test_a_run_that_did_not_complete_has_exit_code_1_and_says_why(simulate: Simulate, scenario: str, error: str):
    result = simulate(scenario)
    assert result.exit_code == 1
    assert result.stderr.startswith("fedmitr: the run failed: ")
    assert error in result.stderr


@pytest.mark.parametrize("scenario", ["completed", "crashed", "early-exit", "refused"])
def test_no_process_and_no_temporary_file_is_left(simulate: Simulate, stage: Stage, scenario: str):
    simulate(scenario)
    assert stage.left_behind() == []
    assert not stage.home().exists()


def test_what_an_earlier_run_of_the_same_name_left_does_not_count(simulate: Simulate, tmp_path: Path):
    assert simulate("completed", "--set", "run.name=again").exit_code == 0
    result = simulate("early-exit", "--set", "run.name=again")
    assert result.exit_code == 1
    assert str(tmp_path / "outputs") not in result.stdout


def test_a_name_with_uploads_is_refused_before_flower_starts(simulate: Simulate, stage: Stage, tmp_path: Path):
    upload = tmp_path / "outputs" / "again" / "uploads" / "round-1" / "partition-0.safetensors"
    upload.parent.mkdir(parents=True)
    upload.touch()
    result = simulate("completed", "--set", "run.name=again")
    assert result.exit_code == 2
    assert result.stderr.startswith('fedmitr: run.name = "again": ')
    assert f"fedmitr resume {tmp_path / 'outputs' / 'again'}" in result.stderr
    assert not stage.record.exists()
    assert upload.exists()


def test_flower_s_slow_start_is_tried_again_with_other_ports_and_without_its_database(simulate: Simulate, stage: Stage):
    assert simulate("slow-start").exit_code == 0
    assert (stage.folder / "record.json.tries").read_text() == "xxx"


def test_the_run_gets_a_flower_of_its_own(simulate: Simulate, stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    monkeypatch.setenv("NO_PROXY", "intern.example.org")
    monkeypatch.setenv("ALL_PROXY", "socks4://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    simulate("completed")
    told = stage.told()
    env = told["env"]
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] not in ("39091", env["FLWR_LOCAL_CONTROL_API_PORT"])
    assert env["no_proxy"] == env["NO_PROXY"] == "intern.example.org,127.0.0.1,localhost"
    assert "RAY_ADDRESS" not in env
    assert "ALL_PROXY" not in env, "Flower's client fails on a proxy of an unknown kind"
    assert env["https_proxy"] == "http://127.0.0.1:9"
    assert str(env["PATH"]).startswith(str(stage.bin))
    assert Path(str(told["cwd"])).parent == stage.home()


def test_file_and_keys_become_one_run_config_with_every_key(simulate: Simulate, stage: Stage, tmp_path: Path):
    (tmp_path / "mine.toml").write_text('run.seed = 5\n[train]\nepochs = 3\naugment = "none"\n')
    simulate("completed", "mine.toml", "--set", "train.epochs=9", "--set", "model.init=seeded", "-n", "4")
    argv = stage.told()["argv"]
    config = dict(flatten(stage.told()["config"]))
    assert (argv[0], Path(argv[1]).name, argv[2]) == ("run", "app", "--stream")
    assert argv[1] != str(ROOT)  # a copy without the environment
    assert config.keys() == Settings().flat().keys()
    assert (config["run.seed"], config["train.epochs"], config["train.augment"]) == (5, 9, "none")
    assert config["model.init"] == "seeded"
    assert stage.told()["federation"]["num-supernodes"] == 4


def test_stops_without_their_fractions_end_before_flower_starts(simulate: Simulate, stage: Stage):
    result = simulate("completed", "--set", "inversion.stops=3,7")
    assert result.exit_code == cli.BAD_INPUT
    assert "inversion.fractions" in result.stderr
    assert not stage.record.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "run.sed=1"], "run.sed = 1: unknown key; did you mean run.seed?"),
        (["--set", "run.seed"], '--set = "run.seed": must be key=value'),
        (["--set", "train.epochs=-1"], "train.epochs = -1: must be an integer >= 0"),
        (["none.toml"], 'settings file = "none.toml": cannot be read: No such file'),
        (["broken.toml"], 'settings file = "broken.toml": is not TOML'),
        (["list.toml"], 'inversion.stops = "[3, 7]": a list is written as a string with commas'),
        (["--clients", "0"], "num-supernodes = 0: must be an integer >= 1"),
        (["--federation", "unknown.toml"], "num-clients = 3: unknown key; known keys are num-supernodes"),
        (["--federation", "wrong.toml"], "client-resources-num-gpus = -1: must be a number >= 0"),
        (["--cpus", "1", "--federation", "big.toml"], "client-resources-num-cpus = 2: must not exceed the 1 CPU"),
        (["--app", "."], "pyproject.toml"),
    ],
)
def test_bad_input_has_exit_code_2_and_says_what_is_allowed(
    simulate: Simulate, stage: Stage, arguments: list[str], expected: str
):
    files = {
        "broken.toml": "run.seed = = 1",
        "list.toml": "inversion.stops = [3, 7]",
        "unknown.toml": "num-clients = 3",
        "wrong.toml": "client-resources-num-gpus = -1",
        "big.toml": "client-resources-num-cpus = 2",
    }
    for name, text in files.items():
        Path(name).write_text(text)
    result = simulate("completed", *arguments)
    assert result.exit_code == cli.BAD_INPUT
    assert expected in result.stderr
    assert result.stdout == ""
    assert not stage.record.exists()


def test_the_log_is_shown_without_noise_and_without_colours_in_a_pipe(simulate: Simulate):
    output = simulate("completed").stdout
    assert "a line of the log" in output
    assert "To change federation size" not in output
    verbose = simulate("completed", "--verbose").stdout
    assert "INFO :      To change federation size" in verbose


def test_a_traceback_is_shown_for_defects_and_not_for_failures_that_explain_themselves(simulate: Simulate):
    assert "Traceback" in simulate("crashed").stdout
    assert "Traceback" not in simulate("below-quorum").stdout
    assert "Traceback" in simulate("below-quorum", "--verbose").stdout


def test_quiet_shows_the_log_of_failed_runs_only(simulate: Simulate):
    assert len(simulate("completed", "--quiet").stdout.splitlines()) == 1
    assert "a line of the log" in simulate("crashed", "--quiet").stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_everything_with_its_own_exit_code(stage: Stage, number: signal.Signals, code: int):
    stage.scenario.write_text("hangs")
    program = f"from pathlib import Path; from fedmitr_flwr import cli; \
        from fedmitr_flwr.launch import private_flower; \
        private_flower.bin_dir = lambda: Path({str(stage.bin)!r}); cli.main()"
    command = [sys.executable, "-c", program, "simulate", "--set", "run.name=hangs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = stage.folder / "outputs" / "hangs" / "status.json"
    deadline = time.monotonic() + 30
    while not status.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(stage.left_behind()) == 2
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert errors.splitlines()[-1] == f"fedmitr: the run was interrupted by {number.name}"
    assert output.splitlines()[-1] == str(status.parent)
    assert stage.left_behind() == []
    assert not stage.home().exists()


def test_processes_that_ignore_sigterm_are_killed():
    with private_flower.PrivateFlower(patience=0.3) as flower:
        program = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
        )
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(command, env=flower.environment, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        process.stdout.readline()
    assert not psutil.pid_exists(process.pid)
    process.stdout.close()


def test_processes_of_other_flowers_live_on():
    with private_flower.PrivateFlower() as other:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=other.environment)
        with private_flower.PrivateFlower():
            pass
        assert process.poll() is None
    assert not psutil.pid_exists(process.pid)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("run.name=10", "10"),
        ("run.name='10'", "10"),
        ("inversion.stops=5", "5"),
        ("inversion.stops=[3, 7]", "3,7"),
        ("inversion.fractions=0.3, 0.2", "0.3, 0.2"),
        ("model.options=patch_size=2,depth=2", "patch_size=2,depth=2"),
        ("run.seed=7", 7),
        ("train.learning-rate=1e-3", 0.001),
        ("train.balanced-softmax=false", False),
        ("data.source=npz:my file.npz", "npz:my file.npz"),
        ("model.init=", ""),
    ],
)
def test_values_of_set_need_no_quotes_and_keep_their_type(text: str, value: object):
    parsed = settings_files._override(text)[1]
    assert parsed == value
    assert type(parsed) is type(value)


def test_relative_paths_count_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    settings = settings_files.run_settings(ROOT, None, ["data.source=folder:a/b", "model.init=file:c.safetensors"])
    assert settings.run.output == str(tmp_path / "outputs")
    assert settings.data.source == f"folder:{tmp_path / 'a' / 'b'}"
    assert settings.model.init == f"file:{tmp_path / 'c.safetensors'}"


def test_an_app_s_own_defaults_apply(tmp_path: Path):
    block = settings_docs.pyproject_block()
    (tmp_path / "pyproject.toml").write_text(block.replace("run.seed = 42", "run.seed = 99"))
    assert settings_files.run_settings(settings_files.app_directory(tmp_path)).run.seed == 99


def test_an_app_that_does_not_declare_all_keys_is_refused_with_the_keys(tmp_path: Path):
    (tmp_path / "pyproject.toml").write_text(settings_docs.pyproject_block().replace("run.seed = 42\n", ""))
    with pytest.raises(SettingsError, match=r"must declare run\.seed, or Flower refuses"):
        settings_files.run_settings(settings_files.app_directory(tmp_path))


def test_a_folder_without_a_flower_app_is_refused(tmp_path: Path):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    with pytest.raises(SettingsError, match=r"no \[tool.flwr.app\] table"):
        settings_files.app_directory(tmp_path)


def test_clients_win_over_the_federation_file_and_cores_follow_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(settings_files, "_cpu_count", lambda: 8)
    (tmp_path / "f.toml").write_text("num-supernodes = 5\nclient-resources-num-cpus = 2\n")
    assert settings_files.federation_config()["num-supernodes"] == 10
    assert settings_files.federation_config()["init-args-num-cpus"] == 8
    assert settings_files.federation_config(clients=3)["init-args-num-cpus"] == 3
    from_file = settings_files.federation_config(tmp_path / "f.toml", clients=2)
    assert (from_file["num-supernodes"], from_file["init-args-num-cpus"]) == (2, 4)
    assert settings_files.federation_config(cpus=1)["init-args-num-cpus"] == 1


def test_settings_checks_a_file_and_single_keys_and_prints_what_a_run_would_have(tmp_path: Path):
    conf = tmp_path / "mine.toml"
    conf.write_text("run.seed = 7\n[inversion]\nimages = 30\n")
    result = CliRunner().invoke(cli.app, ["settings", str(conf), "--set", "train.epochs=3", "--format", "toml"])
    assert result.exit_code == 0, result.stderr
    values = dict(flatten(tomllib.loads(result.stdout)))
    assert values == Settings().flat() | {"run.seed": 7, "inversion.images": 30, "train.epochs": 3}
    table = CliRunner().invoke(cli.app, ["settings", str(conf)]).stdout
    assert f"run.seed = 7    [an integer >= 0 and <= 2147483647; default 42; from {conf}]" in table


def test_settings_names_the_keys_that_plain_flwr_run_refuses_without_naming_them(tmp_path: Path):
    conf = tmp_path / "wrong.toml"
    conf.write_text("run.sed = 1\ntrain.epochs = -1\n")
    result = CliRunner().invoke(cli.app, ["settings", str(conf)])
    assert result.exit_code == cli.BAD_INPUT
    assert "run.sed = 1: unknown key; did you mean run.seed?" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.trainable=last-0"], 'train.trainable = "last-0": must be a string matching'),
        (["train.trainable=last-5"], 'train.trainable = "last-5": the model has 4 blocks; must be'),
        (
            ["train.trainable=last-13", "model.options="],
            'train.trainable = "last-13": the model has 12 blocks; must be',
        ),
        (["train.trainable=lora", "train.lora-rank=65"], "train.lora-rank = 65: must be at most 64"),
    ],
)
def test_settings_check_what_is_trained_against_the_model(changes: list[str], said: str):
    options = [part for change in changes for part in ("--set", change)]
    result = CliRunner().invoke(cli.app, ["settings", *options])
    assert result.exit_code == cli.BAD_INPUT
    assert said in result.stderr
    assert CliRunner().invoke(cli.app, ["settings", "--set", "train.trainable=last-4"]).exit_code == 0


@pytest.mark.parametrize("style", ["table", "toml", "json"])
def test_settings_are_printed_in_every_format(style: str):
    result = CliRunner().invoke(cli.app, ["settings", "--format", style])
    assert result.exit_code == 0
    assert "inversion.iterations" in result.stdout
    if style == "toml":
        assert dict(flatten(tomllib.loads(result.stdout))) == Settings().run_config()


def test_version_and_help_are_there():
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == f"fedmitr {fedmitr_flwr.__version__}\n"
    for command in ("simulate", "settings", "initial"):
        assert CliRunner().invoke(cli.app, [command, "--help"]).exit_code == 0


def test_importing_the_command_does_not_import_torch():
    program = "import sys, fedmitr_flwr.cli; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ), check=False).returncode == 0
