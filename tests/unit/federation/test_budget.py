"""What a run needs of the server's machine is worked out before it, and is near what it takes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.federation.plan import check_disk, disk_bytes
from fedmitr_flwr.federation.uploads.store import UploadStore
from fedmitr_flwr.pipeline.checkpoints import Checkpoints
from fedmitr_flwr.pipeline.inputs import PipelineInputs, Upload
from fedmitr_flwr.pipeline.methods.fedmitr import run_pipeline
from fedmitr_flwr.runs.atomic import TEMPORARY_SUFFIX
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError
from fedmitr_flwr.training.initial import initial_or_stored, initial_state

SPEC = ImageSpec(("cat", "dog"), 1, 28, (0.5,), (0.5,))
MB = 10**6


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**12, 10**12 - free, free))


def test_a_disk_that_is_too_small_is_told_with_both_figures_and_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings().replace(**{"run.output": str(tmp_path / "not" / "yet")})
    with_free(monkeypatch, 10 * MB)
    check_disk(settings, SPEC, 1)
    with pytest.raises(SettingsError) as refusal:
        check_disk(settings, SPEC, 100)
    need = f"{disk_bytes(settings, SPEC, 100) / MB:,.0f}"
    text = str(refusal.value)
    assert f"run.output = {settings.run.output!r}" in text.replace('"', "'")
    assert f"{tmp_path} has 10 MB free, the run needs about {need} MB: 100 uploads of 0.6 MB" in text


def test_a_run_that_just_fits_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings().replace(**{"run.output": str(tmp_path)})
    need = disk_bytes(settings, SPEC, 50)
    with_free(monkeypatch, need)
    check_disk(settings, SPEC, 50)
    with_free(monkeypatch, need - 1)
    with pytest.raises(SettingsError):
        check_disk(settings, SPEC, 50)


def test_what_a_resumed_run_has_written_need_not_be_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "cut-off"
    (run / "uploads").mkdir(parents=True)
    need = disk_bytes(Settings(), SPEC, 10)
    with_free(monkeypatch, need // 2)
    settings = Settings().replace(**{"run.output": str(tmp_path), "run.resume": str(run)})
    with pytest.raises(SettingsError):
        check_disk(settings, SPEC, 10)
    (run / "uploads" / "a.safetensors").write_bytes(bytes(need // 2 + 1))
    check_disk(settings, SPEC, 10)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_uploads_of_half_the_size_need_half_the_space(dtype: str) -> None:
    plain = Settings().replace(**{"distill.feature-weight": 0.0, "distill.teacher-weight": 0.0})
    full, half = (plain.replace(**{"train.upload-dtype": name}) for name in ("fp32", dtype))
    of_uploads = [disk_bytes(settings, SPEC, 1000) - disk_bytes(settings, SPEC, 0) for settings in (full, half)]
    assert of_uploads[0] == 2 * of_uploads[1]


def test_what_a_client_adds_to_the_state_of_distillation_is_counted() -> None:
    settings = Settings()
    plain = settings.replace(**{"distill.feature-weight": 0.0, "distill.teacher-weight": 0.0})
    added = [disk_bytes(settings, SPEC, count) - disk_bytes(plain, SPEC, count) for count in (10, 30)]
    # Two states of 64 x 65 numbers of a map, each with two moments, and of a head for two classes.
    assert 10 * 2 * 4 * 3 * 64 * 65 < added[0] < 10 * 2 * 4 * 3 * 66 * 65
    assert added[1] == 3 * added[0]


def test_each_round_keeps_uploads_of_its_own() -> None:
    one, three = (disk_bytes(Settings().replace(**{"run.rounds": rounds}), SPEC, 100) for rounds in (1, 3))
    assert 2.5 * one < three < 3 * one


def test_the_estimate_covers_what_a_run_has_on_the_disk_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, RunConfigValue] = {
        "model.init": "seeded",
        "model.options": "patch_size=7,embed_dim=32,depth=2,num_heads=2",
        "inversion.images": 16,
        "inversion.batch-size": 8,
        "inversion.iterations": 4,
        "inversion.stops": "2",
        "inversion.fractions": "0.3",
        "distill.steps": 4,
        "distill.batch-size": 8,
        "distill.noise": 1.0,
    }
    settings = Settings().replace(**changes)
    initial = initial_or_stored(tmp_path / "initial.safetensors", lambda: initial_state(settings, SPEC))
    store = UploadStore(tmp_path / "uploads", initial, 2)
    for number in range(3):
        state = {name: value + 0.01 * (number + 1) for name, value in initial.items()}
        store.accept(f"site-{number}", state, num_examples=5, numbers={"loss": 0.1, "accuracy": 0.9})
    clients = [Upload(store.open(upload), upload.num_examples, None) for upload in store.uploads()]
    sizes = []
    replace = os.replace

    def replaced(source: Path, target: Path) -> None:
        sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
        assert source.suffix == TEMPORARY_SUFFIX
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 0.0)
    run_pipeline(PipelineInputs(settings, SPEC, clients, initial, seed=1, checkpoints=checkpoints))
    exported = (tmp_path / "initial.safetensors").stat().st_size
    used = (max(sizes) + exported) / disk_bytes(settings, SPEC, 3)
    assert 0.6 < used <= 1.0
