"""The strategy with a fake grid: whom it asks, what it makes of the answers, and rounds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message, MessageType, RecordDict

import client_app.app as client_module
import fedmitr_flwr.federation.strategy as strategy_module
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.federation.quorum import QuorumError, wait_for_nodes
from fedmitr_flwr.federation.uploads.records import decode_trusted
from fedmitr_flwr.models.feature_prior import FeaturePrior
from fedmitr_flwr.runs.directory import COLLECTED, RunDirectory
from fedmitr_flwr.settings import RunConfigValue, RunSettings
from fedmitr_flwr.training.client import client_name, training_seed
from fedmitr_flwr.training.upload import ClientTask
from tests.unit.federation.fake_federation import (
    INITIAL,
    SPEC,
    Behaviour,
    FakeGrid,
    changed,
    counts,
    failing,
    honest,
    make,
    silent,
    start,
    with_nan,
)

pytestmark = pytest.mark.usefixtures("fakes")


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
        "partition-5: 6 images, training loss 0.5, training accuracy 75.0 %",
    ):
        assert text in caplog.text


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


def test_the_next_round_starts_from_the_global_model(run: RunDirectory) -> None:
    strategy, pipeline = make(run)
    result = start(strategy, FakeGrid([honest] * 3), rounds=2)
    assert torch.equal(pipeline.initial[0]["head.bias"], torch.zeros(3))
    assert torch.equal(pipeline.initial[1]["head.bias"], torch.full((3,), 2.0))
    assert torch.equal(result["head.bias"], torch.full((3,), 4.0))
    assert len(set(pipeline.seeds)) == 2
    assert len(list(run.uploads(2).glob("*.safetensors"))) == 3


@pytest.mark.parametrize(("head", "with_prior"), [("initial", []), ("discriminant", [1])])
def test_the_prior_of_the_heads_is_sent_in_the_first_round_only(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, head: str, with_prior: list[int]
) -> None:
    prior = FeaturePrior(torch.ones(4), torch.eye(4))
    monkeypatch.setattr(strategy_module, "feature_prior", lambda *arguments: prior)
    strategy, _ = make(run, **{"train.head-start": head})
    grid = FakeGrid([honest] * 3)
    start(strategy, grid, rounds=2)
    rounds = {int(str(message.content.config_records["config"]["round"])): message for message in grid.sent}
    assert len(rounds) == 2
    assert [number for number, message in rounds.items() if "prior" in message.content.array_records] == with_prior
    for number in with_prior:
        sent = FeaturePrior.from_tensors(decode_trusted(rounds[number].content.array_records["prior"]))
        assert torch.equal(sent.covariance, prior.covariance)


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
    with RunDirectory.resume(tmp_path / "run") as run, pytest.raises(ValueError, match="those that were collected"):
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
    seeds = {training_seed(config, client_name(config, 0), 42, turn) for config in configs for turn in (1, 2)}
    assert len(seeds) == 8
    assert training_seed({"partition-id": 3}, "partition-3", 42, 1) == 45
