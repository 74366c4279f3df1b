"""A reply that hangs while it is fetched holds up neither the others nor the deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmitr_flwr.federation.exchange.replies import Pulls
from fedmitr_flwr.federation.exchange.windowed_grid import WindowedGrid
from fedmitr_flwr.settings import RunSettings
from tests.unit.federation.test_exchange import Nodes


class HangingNodes(Nodes):
    """As `Nodes`, but the arrays of node 101 are there only once `arrived` is set."""

    def __init__(self, *nodes: int) -> None:
        super().__init__({node: ["ok"] for node in nodes})
        self.arrived = threading.Event()
        self.pulls_of_101 = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (name,) = message_ids
        if name.startswith("101"):
            self.pulls_of_101 += 1
            assert self.arrived.wait(60)
        return super().pull_messages([name])


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> HangingNodes:
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower sets them in its processes
        monkeypatch.setattr(TaskIdentity, name, 1)
    return HangingNodes(100, 101, 102)


def send(nodes: HangingNodes) -> list[str]:
    return [
        name for node in nodes.scripts for name in nodes.push_messages([Message(RecordDict(), node, MessageType.TRAIN)])
    ]


def senders(replies: Iterable[Message]) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def test_the_others_come_while_one_hangs_and_it_comes_later(nodes: HangingNodes) -> None:
    names, pulls = send(nodes), Pulls(nodes, patience=0.05)
    assert senders(pulls.look(names, float("inf"))) == [100, 102]
    waiting = [name for name in names if name.startswith("101")]
    assert senders(pulls.look(waiting, float("inf"))) == []
    nodes.arrived.set()
    found: list[int] = []
    while not found:
        found = senders(pulls.look(waiting, float("inf")))
    assert found == [101]
    assert nodes.pulls_of_101 == 1


def test_the_deadline_holds_while_one_hangs(nodes: HangingNodes) -> None:
    messages = [Message(RecordDict(), node, MessageType.TRAIN) for node in nodes.scripts]
    start = time.monotonic()
    assert senders(WindowedGrid(nodes, RunSettings()).send_and_receive(messages, timeout=1.0)) == [100, 102]
    assert 1.0 <= time.monotonic() - start < 30
    nodes.arrived.set()


def test_what_a_pull_raises_is_raised(nodes: HangingNodes) -> None:
    with pytest.raises(KeyError):
        list(Pulls(nodes).look(["unknown"], float("inf")))
