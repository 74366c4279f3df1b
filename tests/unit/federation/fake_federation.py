"""A federation without network and training: the real ClientApp and real messages, and any misbehaviour of a client."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

import client_app.app as client_module
from client_app.app import app as client
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.federation import quorum
from fedmitr_flwr.federation.exchange import windowed_grid
from fedmitr_flwr.federation.strategy import FedMITR
from fedmitr_flwr.federation.uploads.records import decode_trusted, encode_state
from fedmitr_flwr.models.moments import Moments
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult, Upload
from fedmitr_flwr.runs.directory import RunDirectory
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import RunConfigValue, Settings
from fedmitr_flwr.training.upload import ClientTask, ClientUpload

SPEC = ImageSpec(("cat", "dog", "eel"), 1, 8, (0.5,), (0.5,))
INITIAL = {"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)}
Behaviour = Callable[[Message, int], Message | None]


class FakeGrid(Grid):
    """Nodes 100, 101, … of which each answers as its behaviour says, in a random order."""

    def __init__(self, behaviours: Sequence[Behaviour], shuffle: int = 0) -> None:
        self.behaviours = behaviours
        self.random = random.Random(shuffle)
        self.sent: list[Message] = []
        self.pulled: set[str] = set()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("holds all replies")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self.sent.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in message_ids:
            assert name not in self.pulled, "Flower fails for a message that is pulled twice"
            if self.random.random() < 0.5:
                continue  # not yet
            message = self.sent[int(name.removeprefix("message-"))]
            partition = message.metadata.dst_node_id - 100
            reply = self.behaviours[partition](message, partition)
            if reply is not None:
                self.pulled.add(name)
                replies.append(reply)
        return replies

    def get_node_ids(self) -> Iterable[int]:
        return [100 + partition for partition in range(len(self.behaviours))]

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError


def honest(message: Message, partition: int) -> Message:
    """Answer with the real ClientApp; its training is `fake_training`."""
    node_config: dict[str, RunConfigValue] = {"partition-id": partition, "num-partitions": 10}
    return client(message, Context(1, 100 + partition, node_config, RecordDict(), {}))


def changed(change: Callable[[RecordDict], None]) -> Behaviour:
    def behaviour(message: Message, partition: int) -> Message:
        reply = honest(message, partition)
        change(reply.content)
        return reply

    return behaviour


def with_nan(content: RecordDict) -> None:
    bias = content.array_records["arrays"]["head.bias"]
    content.array_records["arrays"]["head.bias"] = Array(torch.full(bias.shape, torch.nan))


def failing(message: Message, partition: int) -> Message:
    return Message(
        Error(2, "Traceback (most recent call last):\n  …\nMemoryError: no memory left\n\n"), reply_to=message
    )


def silent(message: Message, partition: int) -> None:
    return None


def fake_training(task: ClientTask, node_config: Mapping[str, RunConfigValue], name: str) -> ClientUpload | None:
    partition = int(node_config["partition-id"])
    if partition == 9:
        return None
    state = {key: value + partition + 1 for key, value in task.initial.items()}
    shared = (partition, 0, 1) if task.settings.train.share_label_histogram else None
    moments = fake_moments(partition) if task.settings.train.share_moments else None
    return ClientUpload(state, partition + 1, shared, 0.5, 0.75, {"loss": 0.5, "accuracy": 0.75}, moments)


def fake_moments(partition: int) -> Moments:
    """Moments of as many random features as the partition has images."""
    features = torch.randn(partition + 1, 4, generator=torch.Generator().manual_seed(partition))
    return Moments.of_features(features, torch.tensor([0] * partition + [2]), 3)


class FakePipeline:
    """Averages the uploads and remembers what it was given."""

    def __init__(self) -> None:
        self.clients: list[list[Upload]] = []
        self.initial: list[Mapping[str, Tensor]] = []
        self.seeds: list[int] = []

    def __call__(self, inputs: PipelineInputs) -> PipelineResult:
        self.clients.append(list(inputs.uploads))
        self.initial.append(inputs.initial)
        self.seeds.append(inputs.seed)
        state = {key: torch.stack([client.state[key] for client in inputs.uploads]).mean(0) for key in inputs.initial}
        return PipelineResult(state, state, *[cast(Any, None)] * 4, {})


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the fakes in the place of training, waiting and Flower's processes."""
    monkeypatch.setattr(client_module, "train_client", fake_training)
    monkeypatch.setattr(quorum, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(windowed_grid, "_NETWORK", 0.001)
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower sets them in its processes
        monkeypatch.setattr(TaskIdentity, name, 1)


def make(run: RunDirectory, **settings: RunConfigValue) -> tuple[FedMITR, FakePipeline]:
    base: dict[str, RunConfigValue] = {
        "run.min-fraction": 0.0,
        "run.deadline-seconds": 1.0,
        "run.max-update-norm": 0.0,
        "run.wait-nodes-seconds": 0.0,
        "train.share-label-histogram": True,
    }
    values = Settings().replace(**{**base, **settings})
    pipeline = FakePipeline()
    device = torch.device("cpu")
    return FedMITR(values, SPEC, run, device=device, observer=Observer(), pipeline=pipeline), pipeline


def start(strategy: FedMITR, grid: FakeGrid, rounds: int = 1) -> dict[str, Tensor]:
    return decode_trusted(strategy.start(grid, encode_state(INITIAL), num_rounds=rounds).arrays)


def counts(strategy: FedMITR) -> dict[str, int]:
    assert strategy.outcome is not None
    return strategy.outcome.clients.as_dict()
