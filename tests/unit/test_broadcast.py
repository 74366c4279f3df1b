"""Many messages with one content put it into Ray's object store once, and clients get plain records."""

from __future__ import annotations

import pickle

import pytest
import ray
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmitr_flwr import broadcast
from fedmitr_flwr.broadcast import Broadcast, share_contents


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


def content() -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"weight": Array(torch.ones(100_000))})})


def test_a_content_is_stored_once_for_all_messages_that_hold_it(stored: list[object]) -> None:
    one, other = content(), content()
    messages = [Message(records, node, MessageType.TRAIN) for node, records in enumerate([one, one, other, one])]
    share_contents(messages)
    for message in messages:
        assert isinstance(message.content, Broadcast)
        message.content.share()
    assert stored == [one, other]
    assert [type(records) for records in stored] == [RecordDict, RecordDict]
    assert messages[0].content is messages[1].content is messages[3].content


def test_a_shared_content_is_pickled_as_its_reference_and_before_as_plain_records(stored: list[object]) -> None:
    shared = Broadcast(content())
    whole = pickle.dumps(shared)
    assert len(whole) > 400_000
    assert type(pickle.loads(whole)) is RecordDict
    assert pickle.loads(whole) == content()
    shared.share()
    make, arguments = shared.__reduce__()
    assert make == ray.get
    assert arguments == ("reference 1",)
