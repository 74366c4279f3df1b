"""Between training and sending, an upload passes through steps and gets the numbers that it reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmitr_flwr.data import load_spec
from fedmitr_flwr.settings import Settings
from fedmitr_flwr.training import upload_steps
from fedmitr_flwr.training.client import train_client, training_seed
from fedmitr_flwr.training.initial import initial_state
from fedmitr_flwr.training.reported import REPORTED
from fedmitr_flwr.training.upload import ClientTask, ClientUpload
from fedmitr_flwr.training.upload_steps import prepare_upload

SETTINGS = Settings().replace(
    **{
        "data.source": "digits",
        "model.init": "seeded",
        "model.options": "patch_size=2,embed_dim=32,depth=1,num_heads=2",
        "train.min-steps": 2,
        "train.max-steps": 2,
        "partition.alpha": 100.0,
    }
)
NODE = {"partition-id": 1, "num-partitions": 4}


def task(**changes: bool) -> ClientTask:
    settings = SETTINGS.replace(**changes)
    spec = load_spec(settings.data)
    return ClientTask(settings, spec, 1, initial_state(settings, spec))


def noisy(upload: ClientUpload, task: ClientTask, generator: torch.Generator) -> ClientUpload:
    bias = upload.state["head.bias"]
    return replace(upload, state={**upload.state, "head.bias": torch.randn(bias.shape, generator=generator)})


@pytest.mark.parametrize("shared", [False, True])
def test_the_histogram_leaves_the_client_only_if_it_is_shared(shared: bool):
    upload = train_client(task(**{"train.share-label-histogram": shared}), NODE, "partition-1")
    assert upload is not None
    assert (upload.histogram is not None) is shared
    if upload.histogram is not None:
        assert sum(upload.histogram) == upload.num_examples


def test_each_reported_number_is_computed_after_the_last_step():
    upload = train_client(task(), NODE, "partition-1")
    assert upload is not None
    assert upload.numbers == {"loss": upload.loss, "accuracy": upload.accuracy}
    assert [number.name for number in REPORTED] == list(upload.numbers)


def test_steps_run_in_order_with_a_generator_that_is_the_client_s_own(monkeypatch: pytest.MonkeyPatch):
    seen: list[ClientUpload] = []

    def note(upload: ClientUpload, task: ClientTask, generator: torch.Generator) -> ClientUpload:
        seen.append(upload)
        return upload

    monkeypatch.setattr(upload_steps, "UPLOAD_STEPS", (noisy, note))
    made = ClientUpload({"head.bias": torch.zeros(5)}, 3, None, 0.1, 0.9)
    seeds = [training_seed({"partition-id": partition}, "", 42, 1) for partition in (0, 0, 1)]
    first, again, other = (prepare_upload(made, task(), seed).state["head.bias"] for seed in seeds)
    assert torch.equal(seen[0].state["head.bias"], first)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
