"""Real Flower runs on Ray: three clients, every stage, far too short to learn anything."""

import json
import os
import subprocess
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch

from fedmitr_flwr.data import load_spec
from fedmitr_flwr.federation.code_digest import code_digest
from fedmitr_flwr.launch.private_flower import PrivateFlower, bin_dir
from fedmitr_flwr.launch.settings_files import run_settings
from fedmitr_flwr.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "conf" / "quick.toml"

pytestmark = pytest.mark.integration


def simulate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(bin_dir() / "fedmitr"), "simulate", str(QUICK), "--clients", "3", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A run of the command, and the directory it printed last."""
    folder = tmp_path_factory.mktemp("simulate")
    # Code of the same name in the user's directory must not be taken for the app's.
    (folder / "client_app").mkdir()
    (folder / "client_app" / "__init__.py").write_text("raise ImportError('the wrong client_app')")
    result = simulate(folder, "--set", "run.seed=3")
    assert result.returncode == 0, result.stdout + result.stderr
    directory = Path(result.stdout.splitlines()[-1])
    assert directory.parent == folder / "outputs"
    return result, directory


def test_a_run_writes_all_its_results(finished: tuple[subprocess.CompletedProcess[str], Path]):
    directory = finished[1]
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    expected = {"metrics.json", "config.json", "status.json", "log.txt", "synthetic.png"}
    expected |= {"report.html", "report.json", "report.safetensors", "metrics.jsonl"}
    assert expected | {"model/model.safetensors", "model/config.json", "model/README.md"} <= names
    assert json.loads((directory / "status.json").read_text())["state"] == "completed"
    assert "partition-2" in (directory / "log.txt").read_text()


def test_its_log_and_its_config_name_the_recipe(finished: tuple[subprocess.CompletedProcess[str], Path]):
    said = 'Recipe scratch, because model.init = "seeded": keys that are not named have their defaults'
    assert said in finished[0].stdout
    assert said in (finished[1] / "log.txt").read_text()
    recipe = json.loads((finished[1] / "config.json").read_text())["recipe"]
    assert recipe == {"name": "scratch", "reason": 'model.init = "seeded"', "keys": [], "named": []}


def test_its_metrics_have_the_documented_keys(finished: tuple[subprocess.CompletedProcess[str], Path]):
    metrics = json.loads((finished[1] / "metrics.json").read_text())
    assert metrics["accuracy"].keys() == {"local_mean", "fedavg", "ensemble", "global"}
    assert all(0.0 <= value <= 1.0 for value in metrics["accuracy"].values())
    assert len(metrics["per_class"]["global"]) == 10
    counts = {"asked": 3, "accepted": 3, "refused": 0, "failed": 0}
    assert {key: metrics["clients"][key] for key in counts} == counts
    assert metrics["seconds"].keys() == {"clients", "collect", "invert", "relabel", "distill", "evaluate"}
    assert metrics["seconds"]["invert"] > 0.0
    assert metrics["peak_rss_mb"] > 0.0


def test_its_config_is_what_was_asked_for(finished: tuple[subprocess.CompletedProcess[str], Path]):
    config = json.loads((finished[1] / "config.json").read_text())
    settings = Settings.from_run_config(config["settings"])
    asked = run_settings(ROOT, QUICK, ["run.seed=3"])
    assert settings.replace(**{"run.name": "", "run.output": asked.run.output}) == asked
    assert config["digest"] == code_digest()
    assert config["versions"]["flwr"] == version("flwr")


def test_its_model_loads_in_one_line_of_timm(finished: tuple[subprocess.CompletedProcess[str], Path]):
    model = timm.create_model(f"local-dir:{finished[1] / 'model'}", pretrained=True).eval()
    spec = load_spec(run_settings(ROOT, QUICK).data)
    with torch.inference_mode():
        logits = model(torch.zeros(2, spec.channels, spec.image_size, spec.image_size))
    assert logits.shape == (2, spec.num_classes)
    assert torch.isfinite(logits).all()


def test_its_output_ends_with_the_accuracies_and_the_path(finished: tuple[subprocess.CompletedProcess[str], Path]):
    lines = finished[0].stdout.splitlines()
    assert any("global model" in line for line in lines[-4:])
    assert lines[-1] == str(finished[1])


def test_it_uses_no_deprecated_feature_of_flower(finished: tuple[subprocess.CompletedProcess[str], Path]):
    assert "DEPRECATED FEATURE" not in finished[0].stdout + (finished[1] / "log.txt").read_text()


def test_a_run_without_answers_fails_and_says_so(tmp_path: Path):
    result = simulate(tmp_path, "--cpus", "1", "--set", "run.deadline-seconds=0.01", "--set", "run.name=silent")
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("fedmitr: the run failed: ")
    assert "no client answered" in result.stderr
    assert json.loads((tmp_path / "outputs" / "silent" / "status.json").read_text())["state"] == "failed"
    assert not (tmp_path / "outputs" / "silent" / "metrics.json").exists()


@pytest.fixture(scope="module")
def flower() -> Iterator[PrivateFlower]:
    with PrivateFlower() as flower:
        yield flower


@pytest.fixture(scope="module")
def bundle(flower: PrivateFlower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app as `flwr build` packs it, unpacked in a directory that is not the checkout."""
    folder = tmp_path_factory.mktemp("bundle")
    flwr(flower, folder, "build", "--app", str(ROOT))
    (fab,) = folder.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        archive.extractall(folder / "fedmitr")
    return folder / "fedmitr"


def flwr(flower: PrivateFlower, folder: Path, *arguments: str) -> str:
    """Run the plain `flwr` command in a folder and return its output."""
    command = [str(bin_dir() / "flwr"), *arguments]
    result = subprocess.run(
        command, cwd=folder, env=flower.environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_bundle_holds_the_code_and_the_settings_files(bundle: Path):
    for package in ("fedmitr_flwr", "client_app", "server_app"):
        for path in (ROOT / package).rglob("*.py"):
            assert (bundle / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    for path in (ROOT / "conf").rglob("*.toml"):
        assert (bundle / path.relative_to(ROOT)).is_file()
    assert tomllib.loads((bundle / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def test_plain_flwr_run_of_the_bundle_completes(bundle: Path, flower: PrivateFlower):
    files = ("--federation-config", "conf/federation/3.toml", "--run-config", "conf/quick.toml")
    output = flwr(flower, bundle, "run", ".", "--stream", *files)
    (run,) = json.loads(flwr(flower, bundle, "ls", "--format", "json"))["runs"]
    assert run["status"] == "finished:completed", output
    (directory,) = (bundle / "outputs").iterdir()
    assert json.loads((directory / "metrics.json").read_text())["clients"]["accepted"] == 3
    assert str(directory) in output


@pytest.fixture(scope="module")
def failed_run(bundle: Path, flower: PrivateFlower) -> str:
    """The output of a plain `flwr run` whose run fails; that its exit code is 0 is asserted by `flwr` above."""
    config = "data.source='digits' model.init='seeded' model.options='patch_size=3,depth=1,embed_dim=8,num_heads=1'"
    return flwr(flower, bundle, "run", ".", "--stream", "--run-config", config)


def test_plain_flwr_run_names_a_setting_that_only_the_data_contradict(failed_run: str):
    assert "patch" in failed_run
    assert "model.options" in failed_run or "data.image-size" in failed_run


def test_flower_still_exits_with_0_for_a_run_that_failed(failed_run: str, bundle: Path, flower: PrivateFlower):
    runs = json.loads(flwr(flower, bundle, "ls", "--format", "json"))["runs"]
    assert runs[0]["status"] == "finished:failed", failed_run


def test_flower_still_leaves_a_superlink_behind_in_a_session_of_its_own(failed_run: str, flower: PrivateFlower):
    left = [process for process in flower.processes() if "flower-superlink" in " ".join(process.cmdline()[:3])]
    assert len(left) == 1, failed_run
    assert os.getsid(left[0].pid) != os.getsid(0)


@pytest.mark.slow
def test_flower_still_takes_another_projects_client_app_for_ours(bundle: Path):
    """Its workers look first where the SuperLink was started: `fedmitr simulate` starts it in an empty folder."""
    with PrivateFlower() as flower:
        (flower.cwd / "client_app").mkdir()
        (flower.cwd / "client_app" / "__init__.py").write_text("raise ImportError('the wrong client_app')")
        files = ("--federation-config", "conf/federation/3.toml", "--run-config", "conf/quick.toml")
        arguments = [str(bundle / part) if part.endswith(".toml") else part for part in files]
        output = flwr(flower, flower.cwd, "run", str(bundle), "--stream", *arguments)
    assert "the wrong client_app" in output


def test_plain_flwr_run_refuses_an_unknown_key_before_anything_starts(bundle: Path, flower: PrivateFlower):
    before = json.loads(flwr(flower, bundle, "ls", "--format", "json"))["runs"]
    command = [str(bin_dir() / "flwr"), "run", ".", "--stream", "--run-config", "run.sed=1"]
    result = subprocess.run(
        command, cwd=bundle, env=flower.environment, capture_output=True, text=True, timeout=300, check=False
    )
    # The words are Flower's own, which docs/faq.md explains; it does not name the key, `fedmitr settings` does.
    assert "Invalid run configuration" in result.stdout + result.stderr
    assert json.loads(flwr(flower, bundle, "ls", "--format", "json"))["runs"] == before
