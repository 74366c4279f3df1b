"""The strategy with a fake grid: real messages, the real ClientApp around a fake training, any misbehaviour."""

from __future__ import annotations

import errno
import io
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

import client_app.app as client_module
from client_app.app import app as client
from fedmitr_flwr import collection, exchange, quorum
from fedmitr_flwr.checkpoints import Checkpoints
from fedmitr_flwr.client import ClientTask, ClientUpload, client_name, client_seed
from fedmitr_flwr.collection import failure_reason
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.pipeline import ClientModel, PipelineResult
from fedmitr_flwr.quorum import QuorumError, wait_for_nodes
from fedmitr_flwr.rundir import COLLECTED, RunDirectory
from fedmitr_flwr.settings import RunConfigValue, RunSettings, Settings
from fedmitr_flwr.strategy import FedMITR
from fedmitr_flwr.training import LocalResult
from fedmitr_flwr.uploads import Upload, UploadStore
from fedmitr_flwr.wire import decode_state, decode_trusted, encode_state

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
    content.array_records["arrays"]["head.bias"] = Array(torch.full((3,), torch.nan))


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
    return ClientUpload(state, LocalResult(0.5, 0.75, partition + 1, (partition, 0, 1)))


class FakePipeline:
    """Averages the uploads and remembers what it was given."""

    def __init__(self) -> None:
        self.clients: list[list[ClientModel]] = []
        self.initial: list[Mapping[str, Tensor]] = []
        self.seeds: list[int] = []

    def __call__(
        self,
        settings: Settings,
        spec: ImageSpec,
        clients: Sequence[ClientModel],
        initial: Mapping[str, Tensor],
        *,
        seed: int,
        device: torch.device,
        observer: Observer,
        checkpoints: Checkpoints | None = None,
    ) -> PipelineResult:
        self.clients.append(list(clients))
        self.initial.append(initial)
        self.seeds.append(seed)
        state = {key: torch.stack([client.state[key] for client in clients]).mean(0) for key in initial}
        return PipelineResult(state, state, *[cast(Any, None)] * 4, {})


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "train_client", fake_training)
    monkeypatch.setattr(quorum, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(exchange, "_NETWORK", (0.001, 4))
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower sets them in its processes
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(str(tmp_path), "run") as directory:
        yield directory


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


def test_every_client_gets_the_common_model_and_all_it_needs(run: RunDirectory) -> None:
    strategy, _ = make(run)
    grid = FakeGrid([honest] * 3)
    start(strategy, grid)
    assert [message.metadata.dst_node_id for message in grid.sent] == [100, 101, 102]
    for message in grid.sent:
        config = message.content.config_records["config"]
        assert message.metadata.message_type == MessageType.TRAIN
        assert config["digest"] == strategy.digest
        assert config["round"] == 1
        assert ImageSpec.from_json(str(config["spec"])) == SPEC
        arrays = decode_trusted(message.content.array_records["arrays"])
        assert all(torch.equal(arrays[key], value) for key, value in INITIAL.items())


def test_no_client_can_work_out_the_id_of_another_ones_message(tmp_path: Path) -> None:
    # Flower takes a reply for the one of the node whose message it names; a message's id is the hash of its content.
    with RunDirectory.create(str(tmp_path), "run") as run:
        first = FakeGrid([honest, honest, silent])
        start(make(run)[0], first)
    (tmp_path / "run" / "uploads" / "round-1" / COLLECTED).unlink()
    with RunDirectory.resume(tmp_path / "run") as run:
        again = FakeGrid([honest] * 3)
        start(make(run)[0], again)
    kinds = [message.metadata.message_type for message in again.sent]
    assert kinds.count(MessageType.QUERY) == 3
    contents = [message.content.object_id for message in (*first.sent, *again.sent)]
    assert len(set(contents)) == len(contents)


def test_uploads_become_the_global_model(run: RunDirectory) -> None:
    strategy, pipeline = make(run)
    result = start(strategy, FakeGrid([honest] * 3))
    assert torch.equal(result["head.bias"], torch.full((3,), 2.0))
    assert [model.num_examples for model in pipeline.clients[0]] == [1, 2, 3]
    assert [model.histogram for model in pipeline.clients[0]] == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
    assert counts(strategy) == {"asked": 3, "accepted": 3, "refused": 0, "failed": 0, "empty": 0}
    assert sorted(path.name for path in run.uploads(1).glob("*.safetensors")) == [
        f"partition-{n}.safetensors" for n in range(3)
    ]


def test_the_order_of_arrival_does_not_change_what_the_pipeline_sees(tmp_path: Path) -> None:
    seen = []
    for shuffle in range(3):
        strategy, pipeline = make(RunDirectory.create(str(tmp_path), str(shuffle)))
        start(strategy, FakeGrid([honest] * 5, shuffle))
        seen.append([model.num_examples for model in pipeline.clients[0]])
    assert seen == [[1, 2, 3, 4, 5]] * 3


def test_each_client_is_counted_once_and_its_reason_logged(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    def dead(message: Message, partition: int) -> Message:
        reply = Message(Error(8, "node gone"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1  # as the SuperLink answers for a node
        return reply

    others = [failing, changed(with_nan), honest, silent, dead, honest]
    strategy, _ = make(run)
    with caplog.at_level(logging.INFO, logger="fedmitr"):
        start(strategy, FakeGrid([honest, honest, honest, *others, honest]))
    assert counts(strategy) == {"asked": 10, "accepted": 5, "refused": 1, "failed": 3, "empty": 1}
    for text in (
        "node 103 failed (code 2): MemoryError: no memory left",
        "upload of node 104 refused: head.bias holds NaN or Inf",
        "node 107 failed (code 8): node gone",
        "node 109 has no data",
        "1 clients did not answer before the deadline",
        "partition-5: 6 images, local accuracy 0.750",
    ):
        assert text in caplog.text


def test_a_refused_upload_has_no_effect_on_the_model(tmp_path: Path) -> None:
    models = []
    for name, last in (("without", silent), ("with", changed(with_nan))):
        strategy, _ = make(RunDirectory.create(str(tmp_path), name))
        models.append(start(strategy, FakeGrid([honest, honest, last])))
    assert all(torch.equal(models[0][key], models[1][key]) for key in INITIAL)


def hostile(record: str, **values: object) -> Behaviour:
    def change(content: RecordDict) -> None:
        cast(dict[str, dict[str, object]], content)[record].update(values)

    return changed(change)


def weights(bias: Tensor) -> Behaviour:
    """An upload with another tensor in the place of head.bias."""
    return hostile("arrays", **{"head.bias": Array(bias)})


def raw_bytes(data: bytes, shape: tuple[int, ...] = (3,), dtype: str = "float32") -> Behaviour:
    """An upload with these bytes for head.bias, of which it declares a shape and a type."""
    return hostile("arrays", **{"head.bias": Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)})


def npy(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    """An npy header followed by twelve bytes."""
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + b"\0" * 12


def reduced(*records: str) -> Behaviour:
    def change(content: RecordDict) -> None:
        for record in records:
            del content[record]

    return changed(change)


def replaced(**records: ArrayRecord | MetricRecord | ConfigRecord) -> Behaviour:
    return changed(lambda content: content.update(records))


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (reduced("config", "metrics", "arrays"), "made by other code: None"),
        (reduced("config"), "made by other code: None"),
        (reduced("metrics"), "num-examples None"),
        (reduced("arrays"), "has no arrays"),
        (replaced(arrays=ArrayRecord()), "holds no tensors"),
        (replaced(arrays=MetricRecord({"x": 1})), "has no arrays"),
        (replaced(arrays=ArrayRecord({"head.bias": Array(torch.zeros(3))})), "1 missing tensor: 'head.weight'"),
        (hostile("config", digest="0" * 64), "made by other code: 000000000000, the server runs"),
        (hostile("config", client=7), "client name 7"),
        (hostile("config", client=b"x"), "client name b'x'"),
        (hostile("config", client="partition-0"), "second upload of client partition-0"),
        (hostile("config", dtype=["fp32"]), "names the number format"),
        (hostile("arrays", more=Array(torch.zeros(1))), "1 unexpected tensor: 'more'"),
        (hostile("arrays", **{"head.bias": Array(torch.zeros(1))}), r"head.bias has shape (1,), expected (3,)"),
        (hostile("metrics", **{"num-examples": 0}), "num-examples 0"),
        (hostile("metrics", **{"num-examples": -3}), "num-examples -3"),
        (hostile("metrics", **{"num-examples": 2.0}), "num-examples 2.0"),
        (hostile("metrics", **{"num-examples": [2]}), "num-examples [2]"),
        (hostile("metrics", histogram=[1, 1, 1]), "histogram sums to 3, but num-examples is 2"),
        (hostile("metrics", histogram=[1, 1]), "is not a list of 3 counts"),
        (hostile("metrics", loss=float("nan")), "loss nan"),
        (hostile("metrics", accuracy=2), "accuracy 2.0 is not between"),
        (hostile("metrics", **{"num-examples": 10**18}), "num-examples 1000000000000000000"),
        (hostile("metrics", loss=float("-inf")), "loss -inf"),
        (hostile("metrics", histogram=[3, -1, 0]), "histogram entry -1"),
        (hostile("config", client=""), "client name ''"),
        (hostile("config", client="../../etc/passwd\n"), "is not 1 to 128 printable characters"),
        (weights(torch.full((3,), torch.nan)), "head.bias holds NaN or Inf"),
        (weights(torch.tensor([0.0, torch.inf, 0.0])), "head.bias holds NaN or Inf"),
        (weights(torch.full((3,), -torch.inf)), "head.bias holds NaN or Inf"),
        (weights(torch.full((3,), 1e6)), "from the common initialisation, above run.max-update-norm"),
        (weights(torch.full((3,), 3e38)), "from the common initialisation, above run.max-update-norm"),
        (weights(torch.zeros(3, dtype=torch.float64)), "head.bias has dtype 'float64'"),
        (weights(torch.zeros(3, dtype=torch.int64)), "head.bias has dtype torch.int64"),
        (weights(torch.zeros(3, dtype=torch.bool)), "head.bias has dtype torch.bool"),
        (weights(torch.zeros(4)), "head.bias has shape (4,)"),
        (weights(torch.zeros(())), "head.bias has shape ()"),
        (weights(torch.zeros(3, 1)), "head.bias has shape (3, 1)"),
        (raw_bytes(npy((3,))[:-1]), "has 11 bytes of values, expected 12"),
        (raw_bytes(npy((3,)) + b"0000"), "has 16 bytes of values, expected 12"),
        (raw_bytes(npy((3,))[:20]), "head.bias is not an npy array"),
        (raw_bytes(b""), "head.bias is not an npy array"),
        (raw_bytes(b"\x80\x04cos\nsystem\n."), "head.bias is not an npy array"),
        (raw_bytes(npy((10**13,))), "but its bytes say float32 (10000000000000,)"),
        (raw_bytes(npy((10**13,)), (10**13,)), "head.bias has shape (10000000000000,)"),
        (raw_bytes(npy((3,), "|O")), "but its bytes say object"),
        (raw_bytes(npy((3,), "|O"), (3,), "object"), "head.bias has dtype 'object'"),
        (raw_bytes(npy((3,), ">f4")), "but its bytes say >f4"),
    ],
)
def test_a_broken_reply_costs_only_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, behaviour: Behaviour, reason: str
) -> None:
    models = []
    for name, others in (("without", []), ("with", [behaviour])):
        with RunDirectory.create(str(tmp_path), name) as run:
            strategy, pipeline = make(run, **{"run.max-update-norm": 10.0, "run.window": 1})
            models.append(start(strategy, FakeGrid([honest, *others])))
            accepted = {"asked": 1 + len(others), "accepted": 1, "refused": len(others), "failed": 0, "empty": 0}
            assert counts(strategy) == accepted
            assert [model.num_examples for model in pipeline.clients[0]] == [1]
    assert reason in caplog.text
    assert all(torch.equal(models[0][key], models[1][key]) for key in INITIAL)


@pytest.mark.parametrize(
    ("behaviours", "settings", "message"),
    [
        ([failing, failing, silent], {}, "no client answered with an upload: 3 asked, 0 accepted, 0 refused, 3 failed"),
        ([silent], {}, "no client answered with an upload: 1 asked, 0 accepted, 0 refused, 1 failed or silent"),
        ([changed(with_nan)] * 2, {}, "too few uploads: 2 asked, 0 accepted, 2 refused, 0 failed or silent, 0 without"),
        (
            [honest, silent, failing],
            {"run.min-clients": 2},
            "too few uploads: 3 asked, 1 accepted, 0 refused, 2 failed",
        ),
        ([honest, honest, silent, failing], {"run.min-fraction": 0.6}, r"too few clients answered \(2 of 4\)"),
    ],
)
def test_below_the_quorum_the_run_fails_and_says_what_came(
    run: RunDirectory, behaviours: list[Behaviour], settings: dict[str, RunConfigValue], message: str
) -> None:
    strategy, pipeline = make(run, **settings)
    with pytest.raises(QuorumError, match=message):
        start(strategy, FakeGrid(behaviours))
    assert pipeline.clients == []
    assert len(list(run.uploads(1).iterdir())) == behaviours.count(honest)


def test_a_reply_that_breaks_the_validation_itself_costs_only_itself(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fragile(record: ArrayRecord, store: UploadStore, dtype: object) -> dict[str, Tensor]:
        if "odd" in record:
            raise TypeError("unhashable type")
        return decode_state(record, store, dtype)

    monkeypatch.setattr(collection, "decode_state", fragile)
    strategy, _ = make(run)
    start(strategy, FakeGrid([honest, hostile("arrays", odd=Array(torch.zeros(1)))]))
    assert counts(strategy)["refused"] == 1
    assert "unreadable (TypeError)" in caplog.text


def test_a_full_disk_fails_the_run_and_keeps_what_came(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = UploadStore.accept

    def filling(store: UploadStore, client: object, *args: Any, **kwargs: Any) -> Upload:
        if client == "partition-1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return accept(store, client, *args, **kwargs)

    monkeypatch.setattr(UploadStore, "accept", filling)
    strategy, _ = make(run)
    with pytest.raises(OSError, match="No space left on device"):
        start(strategy, FakeGrid([honest, honest], shuffle=0))
    assert [path.name for path in run.uploads(1).iterdir()] == ["partition-0.safetensors"]


def test_a_client_without_data_counts_towards_the_fraction_but_not_as_an_upload(
    run: RunDirectory, tmp_path: Path
) -> None:
    def without_data(message: Message, partition: int) -> Message:
        return honest(message, 9)

    strategy, _ = make(run, **{"run.min-fraction": 1.0})
    start(strategy, FakeGrid([honest, without_data, without_data]))
    assert counts(strategy) == {"asked": 3, "accepted": 1, "refused": 0, "failed": 0, "empty": 2}
    strategy, _ = make(RunDirectory.create(str(tmp_path), "other"), **{"run.min-fraction": 1.0})
    with pytest.raises(
        QuorumError, match="too few uploads: 2 asked, 0 accepted, 0 refused, 0 failed or silent, 2 with"
    ):
        start(strategy, FakeGrid([without_data, without_data]))


def test_a_client_with_other_code_refuses_to_train(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    strategy, _ = make(run)
    own, strategy.digest = strategy.digest, "0123456789abcdef"
    with pytest.raises(QuorumError, match="1 asked, 0 accepted, 0 refused, 1 failed"):
        start(strategy, FakeGrid([honest]))
    expected = "node 100 failed (code 2): partition-0: CodeMismatchError: code mismatch: the server runs 0123456789ab, "
    assert f"{expected}this client runs {own[:12]}, imported from" in caplog.text


def test_a_client_that_raises_says_who_it_is_and_why(
    run: RunDirectory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(task: ClientTask, node_config: Mapping[str, RunConfigValue], name: str) -> None:
        raise ValueError("training loss is nan\nin two lines")

    monkeypatch.setattr(client_module, "train_client", broken)
    strategy, _ = make(run)
    with caplog.at_level(logging.DEBUG, logger="fedmitr"), pytest.raises(QuorumError, match="no client answered"):
        start(strategy, FakeGrid([honest]))
    assert "node 100 failed (code 2): partition-0: ValueError: training loss is nan\n" in caplog.text
    assert "in full: partition-0: ValueError: training loss is nan\nin two lines\nTraceback" in caplog.text


def test_a_reply_is_dropped_before_the_next_but_one_is_taken(run: RunDirectory) -> None:
    strategy, _ = make(run)
    grid = FakeGrid([honest] * 4)
    messages = list(strategy.configure_train(1, encode_state(INITIAL), ConfigRecord(), grid))
    grid.push_messages(messages)
    given: list[Message] = []

    def replies() -> Iterator[Message]:
        for message in messages:
            assert all(len(reply.content) == 0 for reply in given[:-1])
            assert len(list(run.uploads(1).glob("*.safetensors"))) >= len(given) - 1
            given.append(honest(message, len(given)))
            yield given[-1]

    strategy.aggregate_train(1, replies())
    assert len(given) == 4


def test_the_next_round_starts_from_the_global_model(run: RunDirectory) -> None:
    strategy, pipeline = make(run)
    result = start(strategy, FakeGrid([honest] * 3), rounds=2)
    assert torch.equal(pipeline.initial[0]["head.bias"], torch.zeros(3))
    assert torch.equal(pipeline.initial[1]["head.bias"], torch.full((3,), 2.0))
    assert torch.equal(result["head.bias"], torch.full((3,), 4.0))
    assert len(set(pipeline.seeds)) == 2
    assert len(list(run.uploads(2).glob("*.safetensors"))) == 3


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_uploads_reach_the_pipeline_as_fp32(run: RunDirectory, dtype: str) -> None:
    strategy, pipeline = make(run, **{"train.upload-dtype": dtype})
    start(strategy, FakeGrid([honest] * 3))
    assert all(model.state["head.bias"].dtype == torch.float32 for model in pipeline.clients[0])
    assert [float(model.state["head.bias"][0]) for model in pipeline.clients[0]] == [1.0, 2.0, 3.0]


def test_a_histogram_that_was_not_asked_for_is_neither_sent_nor_kept(run: RunDirectory) -> None:
    kept: list[bool] = []

    def curious(content: RecordDict) -> None:
        kept.append("histogram" in content.metric_records["metrics"])
        content.metric_records["metrics"]["histogram"] = [1, 1, 0]

    settings: dict[str, RunConfigValue] = {"train.share-label-histogram": False, "ensemble.weighting": "examples"}
    strategy, pipeline = make(run, **settings)
    start(strategy, FakeGrid([honest, changed(curious)]))
    assert kept == [False]
    assert [model.histogram for model in pipeline.clients[0]] == [None, None]


def test_seconds_of_clients_and_of_our_own_work_are_told_apart(run: RunDirectory) -> None:
    strategy, _ = make(run)
    start(strategy, FakeGrid([honest] * 3))
    assert strategy.seconds["clients"] > 0.0
    assert strategy.seconds["collect"] > 0.0


def test_a_run_that_goes_on_asks_only_for_missing_uploads(tmp_path: Path) -> None:
    def trained(grid: FakeGrid) -> list[int]:
        train = [message for message in grid.sent if message.metadata.message_type == MessageType.TRAIN]
        return [message.metadata.dst_node_id - 100 for message in train]

    with RunDirectory.create(str(tmp_path), "whole") as run:
        whole = start(make(run)[0], FakeGrid([honest] * 4))
    with RunDirectory.create(str(tmp_path), "cut") as run, pytest.raises(QuorumError):
        start(make(run, **{"run.min-clients": 4})[0], FakeGrid([honest, failing, honest, silent]))
    with RunDirectory.resume(tmp_path / "cut") as run:
        strategy, pipeline = make(run, **{"run.min-clients": 4})
        grid = FakeGrid([honest] * 4, shuffle=5)
        resumed = start(strategy, grid)
        assert sorted(trained(grid)) == [1, 3]
        assert counts(strategy) == {"asked": 4, "accepted": 4, "refused": 0, "failed": 0, "empty": 0}
        assert [model.num_examples for model in pipeline.clients[0]] == [1, 2, 3, 4]
    assert all(torch.equal(whole[key], resumed[key]) for key in INITIAL)


def test_a_collection_that_was_closed_stays_closed(tmp_path: Path) -> None:
    with RunDirectory.create(str(tmp_path), "run") as run:
        first = start(make(run)[0], FakeGrid([honest, honest, failing]))
    with RunDirectory.resume(tmp_path / "run") as run:
        strategy, _ = make(run)
        grid = FakeGrid([honest] * 3)
        second = start(strategy, grid)
        assert grid.sent == []
        assert counts(strategy) == {"asked": 3, "accepted": 2, "refused": 0, "failed": 1, "empty": 0}
    assert all(torch.equal(first[key], second[key]) for key in INITIAL)
    (tmp_path / "run" / "uploads" / "round-1" / "partition-1.safetensors").unlink()
    with RunDirectory.resume(tmp_path / "run") as run, pytest.raises(ValueError, match="not those that were collected"):
        start(make(run)[0], FakeGrid([honest] * 3))


def test_nodes_are_waited_for_until_their_number_holds_still() -> None:
    looks = iter([[0], [1, 0], [2, 0, 1], [2, 0, 1], [3]])
    assert wait_for_nodes(lambda: next(looks), RunSettings(min_clients=2)) == [0, 1, 2]
    with pytest.raises(
        QuorumError, match=r"0 nodes connected within run\.wait-nodes-seconds = 0\.01; run\.min-clients"
    ):
        wait_for_nodes(list, RunSettings(wait_nodes_seconds=0.01))


def test_a_client_goes_by_its_site_its_partition_or_its_node() -> None:
    assert client_name({"site": "Hospital A", "partition-id": 3}, 77) == "Hospital A"
    assert client_name({"partition-id": 3}, 77) == "partition-3"
    assert client_name({}, 77) == "node-77"


def test_seeds_differ_between_clients_and_rounds() -> None:
    configs: list[dict[str, RunConfigValue]] = [{"partition-id": 0}, {"partition-id": 1}, {"site": "a"}, {"site": "b"}]
    seeds = {client_seed(config, client_name(config, 0), 42, turn) for config in configs for turn in (1, 2)}
    assert len(seeds) == 8
    assert client_seed({"partition-id": 3}, "partition-3", 42, 1) == 45


def test_the_reason_of_a_failure_is_found_in_our_and_in_flowers_replies() -> None:
    assert failure_reason("site: ValueError: x\nTraceback:\n  File\nValueError: x") == "site: ValueError: x"
    assert failure_reason("Traceback (most recent call last):\n  File\nKeyError: 'x'\n\n") == "KeyError: 'x'"
    assert failure_reason("<class 'ray.exceptions.ActorDiedError'>:<'The actor\ndied.'>") == "died.'>"
    assert failure_reason(" \n") == "no reason given"
    assert len(failure_reason("x" * 10_000)) == 500
