"""Many messages with the same arrays put them into Ray's object store once, and clients get plain records."""

from __future__ import annotations

import pickle

import pytest
import ray
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmitr_flwr.federation.exchange import broadcast
from fedmitr_flwr.federation.exchange.broadcast import Broadcast, share_arrays


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was put into a stand-in of Ray's object store."""
    objects: list[object] = []

    def put(value: object) -> str:
        objects.append(value)
        return f"reference {len(objects)}"

    monkeypatch.setattr(broadcast.ray, "put", put)
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower sets them in its processes
        monkeypatch.setattr(TaskIdentity, name, 1)
    return objects


def arrays() -> ArrayRecord:
    return ArrayRecord({"weight": Array(torch.ones(100_000))})


def test_arrays_are_stored_once_for_all_messages_that_hold_them(stored: list[object]) -> None:
    one, other = arrays(), arrays()
    contents = [
        RecordDict({"arrays": held, "config": ConfigRecord({"nonce": number})})
        for number, held in enumerate([one, one, other, one])
    ]
    messages = [Message(content, node, MessageType.TRAIN) for node, content in enumerate(contents)]
    share_arrays(messages)
    for number, message in enumerate(messages):
        assert message.content.config_records["config"]["nonce"] == number
        held = message.content.array_records["arrays"]
        assert isinstance(held, Broadcast)
        held.share()
    assert stored == [one, other]
    assert [type(records) for records in stored] == [ArrayRecord, ArrayRecord]
    first, second, _, fourth = (message.content["arrays"] for message in messages)
    assert first is second is fourth


def test_shared_arrays_are_pickled_as_their_reference_and_before_as_a_plain_record(stored: list[object]) -> None:
    shared = Broadcast(arrays())
    whole = pickle.dumps(shared)
    assert len(whole) > 400_000
    assert type(pickle.loads(whole)) is ArrayRecord
    assert pickle.loads(whole) == arrays()
    shared.share()
    make, arguments = shared.__reduce__()
    assert make == ray.get
    assert arguments == ("reference 1",)
