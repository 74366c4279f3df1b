"""A memory budget is kept by choosing limits, and refused before a client is asked when no limits keep it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.ensemble.engine.teachers import MemoryLimits
from fedmitr_flwr.federation.plan import PROCESS_MB, plan_memory, within_memory
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError

CPU = torch.device("cpu")
SPEC = ImageSpec(("cat", "dog", "eel"), 1, 28, (0.5,), (0.5,))
CLIENTS = 12
SMALL: dict[str, RunConfigValue] = {
    "model.init": "seeded",
    "model.options": "patch_size=7,embed_dim=192,depth=4,num_heads=3",
    "inversion.images": 40,
    "inversion.iterations": 3,
    "inversion.stops": "1",
    "inversion.fractions": "0.3",
    "distill.steps": 3,
    "distill.noise": 20.0,
}
FEW: dict[str, RunConfigValue] = {"distill.noise": 2.0, "inversion.iterations": 2}

RUN = """
import json, sys, torch
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.ensemble.engine.teachers import PagedTeachers
from fedmitr_flwr.federation.plan import within_memory
from fedmitr_flwr.training.initial import initial_state
from fedmitr_flwr.runs.process_memory import peak_rss_mb
from fedmitr_flwr.pipeline.inputs import Upload, PipelineInputs
from fedmitr_flwr.pipeline.methods.fedmitr import run_pipeline
from fedmitr_flwr.settings import Settings

torch.set_num_threads(1)
settings, clients = Settings.from_run_config(json.loads(sys.argv[1])), int(sys.argv[2])
spec = ImageSpec(("cat", "dog", "eel"), 1, 28, (0.5,), (0.5,))
cpu = torch.device("cpu")
planned = within_memory(settings, spec, clients, cpu)
initial = initial_state(settings, spec)

class State(dict):  # made when it is asked for, as uploads are read from disk
    def __init__(self, number):
        super().__init__(initial)
        self.number = number
    def __getitem__(self, name):
        return initial[name] + 0.01 * (self.number + 1)

uploads = [Upload(State(number), 10, None) for number in range(clients)]
start = peak_rss_mb()
result = run_pipeline(PipelineInputs(planned, spec, uploads, initial, seed=1))
kinds = sorted({str(teacher.head.weight.dtype) for teacher in result.ensemble.teachers})
paged = isinstance(result.ensemble.teachers, PagedTeachers)
print(json.dumps({"took": peak_rss_mb() - start, "kinds": kinds, "paged": paged}))
"""


def with_budget(budget: int, **changes: RunConfigValue) -> Settings:
    return Settings().replace(**{**SMALL, "run.memory-mb": budget, **changes})


def test_without_a_budget_nothing_changes() -> None:
    settings = with_budget(0)
    assert within_memory(settings, SPEC, 1000, CPU) == settings


def test_an_ample_budget_leaves_the_limits_that_were_asked_for() -> None:
    settings = with_budget(100_000)
    assert within_memory(settings, SPEC, CLIENTS, CPU) == settings


def test_a_budget_that_cannot_be_kept_names_the_need_and_the_settings_behind_it() -> None:
    settings = with_budget(PROCESS_MB)
    with pytest.raises(
        SettingsError, match=r"run\.memory-mb = 1000.* needs about 1,\d\d\d MiB with 12 clients"
    ) as error:
        within_memory(settings, SPEC, CLIENTS, CPU)
    for key in ("inversion.batch-size", "inversion.images", "distill.noise", "distill.views", "distill.mix"):
        stage, name = key.split(".")
        assert stage in str(error.value)
        assert name.removeprefix("distill.") in str(error.value)


def test_the_stated_need_is_enough_and_a_mebibyte_less_is_not() -> None:
    need = plan_memory(with_budget(1), SPEC, CLIENTS, CPU).peak
    within_memory(with_budget(need), SPEC, CLIENTS, CPU)
    with pytest.raises(SettingsError):
        within_memory(with_budget(need - 1), SPEC, CLIENTS, CPU)


@pytest.mark.parametrize("budget", range(1450, 2200, 50))
def test_a_plan_never_exceeds_its_budget_and_never_raises_a_limit(budget: int) -> None:
    settings = with_budget(budget)
    plan = plan_memory(settings, SPEC, CLIENTS, CPU)
    assert plan.peak <= budget
    assert plan.teacher_limit <= settings.inversion.teacher_memory_mb
    assert plan.activation_limit <= settings.inversion.activation_memory_mb


def test_more_images_in_the_pool_need_more_memory_and_averages_need_none() -> None:
    few, many = (
        plan_memory(with_budget(4000, **{"distill.noise": noise}), SPEC, CLIENTS, CPU).distillation
        for noise in (20.0, 1000.0)
    )
    none = plan_memory(with_budget(4000, **{"run.method": "fedavg"}), SPEC, CLIENTS, CPU)
    assert many > 3 * few
    assert none.distillation < few


def test_a_model_that_cannot_be_packed_has_a_plan_too() -> None:
    options = f"{SMALL['model.options']},pos_embed=none"
    settings = with_budget(4000, **{"model.name": "vit_tiny_patch16_224", "model.options": options})
    plan = plan_memory(settings, SPEC, CLIENTS, CPU)
    assert 0 < plan.activations < 1000
    assert plan.teachers > 0


def test_a_gpu_holds_the_teachers_itself() -> None:
    plan = plan_memory(with_budget(2000), SPEC, 1000, torch.device("cuda"))
    assert plan.peak == PROCESS_MB + plan.collection


def test_a_pipeline_keeps_its_budget_and_a_tighter_one_takes_less() -> None:
    """Teachers are in memory as fp32, then as bf16, then on disk, as the budget shrinks."""
    model, tightest, took = build_model(with_budget(1).model, SPEC), {}, {}
    for budget in (4000, *range(2000, 1000, -10)):
        try:
            limit = within_memory(with_budget(budget, **FEW), SPEC, CLIENTS, CPU).inversion.teacher_memory_mb
        except SettingsError:
            break
        tightest[MemoryLimits(teachers=limit).place(model, CLIENTS)] = budget
    assert list(tightest) == ["held", "bf16", "paged"]
    for place, budget in tightest.items():
        settings = json.dumps({**SMALL, **FEW, "run.memory-mb": budget})
        command = [sys.executable, "-c", RUN, settings, str(CLIENTS)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["kinds"] == ["torch.bfloat16" if place == "bf16" else "torch.float32"]
        assert found["paged"] is (place == "paged")
        assert found["took"] <= budget - PROCESS_MB, place
        took[place] = found["took"]
    assert took["bf16"] < 0.8 * took["held"]
    assert took["paged"] < took["bf16"]
