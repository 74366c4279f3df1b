"""Each common task of CONTRIBUTING, done with a dummy in a copy of the code, touches the files that are listed there.

One program in the copy then uses all dummies. Two clients train and upload through the real ClientApp and strategy, and
the results are written as the ServerApp writes them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT

MOST_FILES = 3
Edit = tuple[str, str, str]
"""File below `fedmitr_flwr/`, text in it, and what stands there afterwards; without text, a new file."""


def choice(last: str, line: str, described: str) -> list[Edit]:
    """Add the name ``dummy`` behind the last one of a list of choices, and its description."""
    file = "settings/choices.py"
    description = f'{described} = (\n    Choice("dummy", description="a dummy"),\n'
    return [
        (file, line, line.replace(f'"{last}"', f'"{last}", "dummy"')),
        (file, f"{described} = (\n", description),
    ]


TASKS: dict[str, list[Edit]] = {
    "An inversion method": [
        *choice("rebirth", 'InversionName = Literal["sparse", "rebirth"]', "INVERSIONS"),
        (
            "stages/inversion/dummy.py",
            "",
            "from fedmitr_flwr.stages.inversion.sparse import invert\n\n\n"
            "def invert_twice(task, labels, **more):\n"
            "    return type(made := invert(task, labels, **more)).join([made, made])\n",
        ),
        (
            "stages/inversion/methods.py",
            "INVERSION: dict[str, InversionMethod] = {\n",
            "from fedmitr_flwr.stages.inversion.dummy import invert_twice\n\n"
            "INVERSION: dict[str, InversionMethod] = {\n"
            '    "dummy": InversionMethod(invert_twice, lambda settings: 2),\n',
        ),
    ],
    "A baseline": [
        *choice("co-boosting", '    "co-boosting",\n]', "METHODS"),
        (
            "pipeline/methods/dummy.py",
            "",
            "from dataclasses import replace\n\n"
            "from fedmitr_flwr.pipeline.methods.common import Method, untrained_result\n\n\n"
            "def first_client(inputs):\n"
            "    return replace(untrained_result(inputs), state=dict(inputs.states[0]))\n\n\n"
            'DUMMY = Method(first_client, "the first client", lambda settings: "It took one upload.", distils=False, '
            "inverts=False)\n",
        ),
        (
            "pipeline/methods/__init__.py",
            "METHODS: dict[str, Method] = {\n",
            "from fedmitr_flwr.pipeline.methods.dummy import DUMMY\n\n"
            'METHODS: dict[str, Method] = {\n    "dummy": DUMMY,\n',
        ),
    ],
    "An ensemble weighting": [
        *choice("competence", '"histogram", "competence"]', "WEIGHTINGS"),
        (
            "ensemble/weighting.py",
            "WEIGHTINGS: dict[str, Callable[[Knowledge], Tensor]] = {\n",
            'WEIGHTINGS: dict[str, Callable[[Knowledge], Tensor]] = {\n    "dummy": uniform,\n',
        ),
    ],
    "A dataset preset": [
        (
            "data/presets.py",
            "PRESETS = {\n",
            'PRESETS = {\n    "me/dummy": Preset(classes=3, geometry=Geometry(1, 16, (0.5,), (0.5,))),\n',
        ),
    ],
    "A report metric": [
        (
            "results/metrics.py",
            "METRICS: tuple[Metric, ...] = (\n",
            "METRICS: tuple[Metric, ...] = (\n"
            '    Metric("dummy", "dummy metric", "Always a quarter.", lambda labels, probabilities: 0.25),\n',
        ),
    ],
    "A number that clients report": [
        (
            "training/reported.py",
            "REPORTED: tuple[Reported, ...] = (\n",
            "REPORTED: tuple[Reported, ...] = (\n"
            '    Reported("dummy", "dummy number", lambda upload, task: len(upload.state) / 2, 0.0),\n',
        ),
    ],
    "A step between training and upload": [
        (
            "settings/client_stages.py",
            "    upload_dtype: UploadDtype",
            '    dummy: bool = Field(False, description="A dummy.")\n    upload_dtype: UploadDtype',
        ),
        (
            "training/dummy.py",
            "",
            "from dataclasses import replace\n\n\n"
            "def zero_bias(upload, task, generator):\n"
            "    if not task.settings.train.dummy:\n"
            "        return upload\n"
            '    return replace(upload, state={**upload.state, "head.bias": 0 * upload.state["head.bias"]})\n',
        ),
        (
            "training/upload_steps.py",
            "UPLOAD_STEPS: tuple[UploadStep, ...] = (withhold_histogram,)",
            "from fedmitr_flwr.training.dummy import zero_bias\n\n"
            "UPLOAD_STEPS: tuple[UploadStep, ...] = (withhold_histogram, zero_bias)",
        ),
    ],
    "A family of random images": [
        *choice("shapes", 'RandomFamily = Literal["fields", "contours", "shapes"]', "RANDOM_FAMILIES"),
        (
            "stages/random_images/dummy.py",
            "",
            "import torch\n\n\n"
            "def grey(count, grid, generator):\n"
            "    return torch.zeros(count, grid.channels, grid.image_size, grid.image_size)\n",
        ),
        (
            "stages/random_images/families.py",
            "FAMILIES: dict[str, Family] = {",
            "from fedmitr_flwr.stages.random_images.dummy import grey\n\n"
            'FAMILIES: dict[str, Family] = {"dummy": grey, ',
        ),
    ],
}

PROGRAM = """
import json, sys
from pathlib import Path

import torch
from flwr.app import RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmitr_flwr.data import load_source, load_spec
from fedmitr_flwr.federation import quorum
from fedmitr_flwr.federation.prepare import Federation, describe_run
from fedmitr_flwr.federation.strategy import FedMITR
from fedmitr_flwr.federation.uploads.records import encode_state
from fedmitr_flwr.pipeline.methods import METHODS
from fedmitr_flwr.results.write import write_results
from fedmitr_flwr.runs.directory import CONFIG, EVENTS, RunDirectory
from fedmitr_flwr.runs.jsonl import JsonLines
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.training.initial import initial_state
from tests.unit.federation.fake_federation import FakeGrid, honest

for name in ("_task_id", "_run_id", "_node_id"):
    setattr(TaskIdentity, name, 1)
quorum._POLL_SECONDS = 0.001
base = {
    "run.output": sys.argv[1], "data.source": "digits", "model.init": "seeded", "partition.alpha": 100.0,
    "model.options": "patch_size=2,embed_dim=32,depth=2,num_heads=2", "train.min-steps": 5, "train.max-steps": 5,
    "train.dummy": True, "inversion.images": 12, "inversion.batch-size": 4, "inversion.iterations": 4,
    "inversion.stops": "1,2", "inversion.fractions": "0.3,0.3", "inversion.start": "dummy", "inversion.method": "dummy",
    "ensemble.weighting": "dummy", "distill.noise-kind": "dummy", "distill.noise": 1.0, "distill.steps": 4,
}
cpu, found = torch.device("cpu"), {}
for method in ("fedmitr", "dummy"):
    settings = Settings.from_run_config({**base, "run.method": method, "run.name": method})
    source = load_source(settings.data)
    federation = Federation(source.spec, source.test, cpu)
    with RunDirectory.create(settings.run.output, settings.run.name) as run:
        run.write_json(CONFIG, describe_run(settings, federation))
        observer = Observer(JsonLines(run.path / EVENTS))
        strategy = FedMITR(settings, source.spec, run, device=cpu, observer=observer, pipeline=METHODS[method])
        initial = encode_state(initial_state(settings, source.spec))
        metrics = strategy.start(FakeGrid([honest, honest]), initial, num_rounds=1).train_metrics_clientapp[1]
        outcome = strategy.outcome
        write_results(run, settings, federation, outcome.result, outcome.clients, observer)
        observer.close()
    result = outcome.result
    found[method] = {
        "synthetic": 0 if result.synthetic is None else len(result.synthetic.labels),
        "bias": float(result.ensemble.teachers[0].head.bias.abs().sum()),
        "weights": result.ensemble.weights.unique().tolist(),
        "first": all(
            torch.equal(result.state[name], value)
            for name, value in result.ensemble.teachers[0].state_dict().items()
        ),
        "local": metrics["local-dummy"],
        "tensors": len(result.state),
    }
spec = load_spec(Settings.from_run_config({**base, "data.source": "hub:me/dummy", "data.class-names": "a,b,c"}).data)
print(json.dumps({**found, "preset": [spec.channels, spec.image_size]}))
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with all dummies in it."""
    folder = tmp_path_factory.mktemp("house")
    for package in ("fedmitr_flwr", "client_app", "server_app"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for edits in TASKS.values():
        for name, old, new in edits:
            path = folder / "fedmitr_flwr" / name
            text = path.read_text("utf-8") if old else ""
            assert text.count(old) == 1 or not old, f"{name} has no single {old!r}"
            path.write_text(text.replace(old, new) if old else new, "utf-8")
    return folder


@pytest.fixture(scope="module")
def found(house: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What the program prints, and under ``files`` where its runs lie."""
    output = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "PYTHONPATH": f"{house}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", PROGRAM, str(output)]
    result = subprocess.run(
        command, cwd=house, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return {**json.loads(result.stdout.splitlines()[-1]), "files": str(output)}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_touches_the_files_that_contributing_lists(task: str) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    section = re.search(rf"### {task}\n(.*?)\n##", page, re.DOTALL)
    assert section, f"CONTRIBUTING has no section {task!r}"
    listed = re.findall(r"^\d\. `fedmitr_flwr/(\S+)`", section[1], re.MULTILINE)
    touched = list(dict.fromkeys(name for name, *_ in TASKS[task]))
    assert [re.sub(r"\bdummy\.py$", "NAME.py", name) for name in touched] == listed
    assert len(touched) <= MOST_FILES


def test_contributing_lists_no_other_task() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert re.findall(r"^### (.*)$", page, re.MULTILINE) == list(TASKS)


def test_an_inversion_method_a_family_and_a_weighting_are_used(found: dict[str, dict[str, float]]) -> None:
    assert found["fedmitr"]["synthetic"] == 12  # 6 labels, two images each
    assert found["fedmitr"]["weights"] == [0.5]


def test_a_baseline_gives_the_global_model(found: dict[str, dict[str, float]]) -> None:
    assert found["dummy"]["first"]
    assert not found["fedmitr"]["first"]
    card = Path(str(found["files"]), "dummy", "model", "README.md").read_text("utf-8")
    assert "the first client" in card
    assert "It took one upload." in card


def test_a_preset_gives_the_geometry_of_its_images(found: dict[str, dict[str, float]]) -> None:
    assert found["preset"] == [1, 16]


def test_a_metric_is_in_metrics_report_and_card(found: dict[str, dict[str, float]]) -> None:
    run = Path(str(found["files"]), "fedmitr")
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))["metrics"]
    assert {model: values["dummy"] for model, values in metrics.items()} == dict.fromkeys(metrics, 0.25)
    assert "Dummy metric: Always a quarter." in (run / "report.html").read_text("utf-8")
    assert "dummy metric 25.0 %" in (run / "model" / "README.md").read_text("utf-8")


def test_a_reported_number_reaches_metrics_events_and_report(found: dict[str, dict[str, float]]) -> None:
    expected = found["fedmitr"]["tensors"] / 2
    assert found["fedmitr"]["local"] == expected
    run = Path(str(found["files"]), "fedmitr")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [event["dummy"] for event in events if event.get("outcome") == "accepted"] == [expected, expected]
    assert "Dummy number" in (run / "report.html").read_text("utf-8")


def test_a_step_changes_what_is_uploaded(found: dict[str, dict[str, float]]) -> None:
    assert found["fedmitr"]["bias"] == 0.0
