"""A run's settings may change as long as nothing that they decided is finished."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmitr_flwr.pipeline.checkpoints import Progress
from fedmitr_flwr.runs.atomic import write_json
from fedmitr_flwr.runs.resume import changes_in, is_complete, resumed_settings, stored_config, with_checksum
from fedmitr_flwr.runs.tensors import write_tensors
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError

STORED = Settings().replace(**{"run.seed": 7, "inversion.images": 50})
FILES = {
    "uploads": "uploads/round-1/partition-0.safetensors",
    "inversion": "checkpoints/round-1/inversion-000000.safetensors",
    "distillation": "checkpoints/round-1/distill.safetensors",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "moved" / "run"
    path.mkdir(parents=True)
    write_json(path / "config.json", {"settings": STORED.flat()})
    return path


def finish(run: Path, *stages: str) -> None:
    for stage in stages:
        file = run / FILES[stage]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_the_settings_of_the_run_apply_where_it_lies_now(run: Path) -> None:
    settings = resumed_settings(run, {})
    assert (settings.run.seed, settings.inversion.images) == (7, 50)
    assert (settings.run.output, settings.run.name, settings.run.resume) == (str(run.parent), run.name, str(run))


@pytest.mark.parametrize(
    ("key", "value", "stage"),
    [
        ("train.learning-rate", 0.5, "uploads"),
        ("data.source", "digits", "uploads"),
        ("partition.alpha", 3.0, "uploads"),
        ("model.init", "seeded", "uploads"),
        ("run.seed", 8, "uploads"),
        ("ensemble.power", 1.0, "inversion"),
        ("inversion.images", 51, "inversion"),
        ("density.rule", "otsu", "distillation"),
        ("relabel.labels", "off", "distillation"),
        ("distill.steps", 7, "distillation"),
    ],
)
def test_a_change_is_refused_once_its_stage_has_finished_something(
    run: Path, key: str, value: RunConfigValue, stage: str
) -> None:
    finish(run, *list(FILES)[: list(FILES).index(stage)])
    assert resumed_settings(run, {key: value}).flat()[key] == value
    finish(run, stage)
    with pytest.raises(SettingsError, match=rf"{key} = .*cannot change, because the run has finished {stage}"):
        resumed_settings(run, {key: value})


@pytest.mark.parametrize("key", ["run.deadline-seconds", "run.min-fraction", "train.time-limit-seconds"])
def test_what_decides_no_result_may_always_change(run: Path, key: str) -> None:
    finish(run, *FILES)
    assert resumed_settings(run, {key: 0.25}).flat()[key] == 0.25


def test_a_folder_without_a_run_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"run\.resume = .*is not a run that can be resumed"):
        resumed_settings(tmp_path, {})


def test_keys_at_their_default_are_taken_from_the_run(run: Path) -> None:
    given = Settings().replace(**{"run.resume": str(run), "distill.steps": 9})
    assert changes_in(given, run) == {"run.resume": str(run), "distill.steps": 9}
    complete = given.replace(**{"run.name": run.name})
    assert changes_in(complete, run)["inversion.iterations"] == Settings().inversion.iterations


def test_only_a_run_with_its_results_is_complete(run: Path) -> None:
    assert not is_complete(run)
    write_json(run / "status.json", {"state": "completed"})
    assert not is_complete(run)
    write_json(run / "metrics.json", {})
    assert is_complete(run)
    write_json(run / "status.json", {"state": "running"})
    assert not is_complete(run)


def test_a_complete_run_with_a_damaged_model_is_not_complete(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(run / "status.json", {"state": "completed"})
    write_json(run / "metrics.json", {})
    model = run / "model" / "model.safetensors"
    model.parent.mkdir()
    write_tensors(model, {"weight": torch.ones(3)}, {"format": "pt"})
    assert is_complete(run)
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    assert not is_complete(run)
    assert f"{model} is damaged: its content differs from its checksum" in caplog.text


@pytest.mark.parametrize("status", ["[]", '{"state": ["completed"]}', "\xff\x00", "[" * 100_000])
def test_a_status_that_no_run_wrote_is_not_complete(run: Path, status: str) -> None:
    (run / "status.json").write_text(status, "latin-1")
    write_json(run / "metrics.json", {})
    assert not is_complete(run)


def test_changed_settings_in_the_configuration_are_refused(run: Path) -> None:
    content = {"settings": {**STORED.flat()}, "federation": {"num-supernodes": 3}, "digest": "a"}
    write_json(run / "config.json", with_checksum(content))
    assert stored_config(run)["federation"] == {"num-supernodes": 3}
    whole = (run / "config.json").read_text()
    for old, new in (('"distill.steps": 1', '"distill.steps": 2'), ('supernodes": 3', 'supernodes": 4')):
        (run / "config.json").write_text(whole.replace(old, new))
        with pytest.raises(SettingsError, match=r"its config\.json is damaged: its settings or federation differ"):
            resumed_settings(run, {})


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": \x00}'])
def test_a_configuration_that_is_no_json_object_is_refused_in_one_line(run: Path, content: bytes) -> None:
    (run / "config.json").write_bytes(content)
    with pytest.raises(SettingsError, match=r"its config\.json is not (valid JSON|a JSON object)") as caught:
        resumed_settings(run, {})
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_training_loop_keeps_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "step": 3,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
            "groups": [{"betas": [0.9, 0.999], "lr": 1 / 3}],
        },
        "queue": torch.zeros(0, dtype=torch.int64),
        "generator": torch.Generator().manual_seed(1).get_state(),
        "none": None,
        "flag": True,
    }
    progress = Progress(tmp_path / "run" / "distill.safetensors", 0.0)
    assert progress.load() is None
    progress.offer(lambda: state)
    found = progress.load()
    assert found is not None
    assert found["optimizer"]["state"][0]["step"].shape == ()
    torch.testing.assert_close(found, state, rtol=0, atol=0)
