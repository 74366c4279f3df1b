"""Messages go out a few at a time, replies come in one at a time, and what was lost is asked for again."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedmitr_flwr.federation.exchange import windowed_grid
from fedmitr_flwr.federation.exchange.windowed_grid import WindowedGrid
from fedmitr_flwr.settings import RunSettings


class Nodes(Grid):
    """Each message is answered by the next entry of its node's script: an error code, "ok", or None for never."""

    def __init__(self, scripts: dict[int, list[int | str | None]]) -> None:
        self.scripts = scripts
        self.online = set(scripts)
        self.flying: dict[str, Message] = {}
        self.most_flying = 0
        self.pushed: list[int] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        node = message.metadata.dst_node_id
        if node not in self.online:
            return []
        name = f"{node}-{len(self.pushed)}"
        message.metadata.__dict__["_message_id"] = name
        self.pushed.append(node)
        self.flying[name] = message
        self.most_flying = max(self.most_flying, len(self.flying))
        return [name]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in message_ids:
            message = self.flying[name]  # fails for one that was answered before
            script = self.scripts[message.metadata.dst_node_id]
            if script[0] is None:
                continue
            answer = script.pop(0)
            del self.flying[name]
            if answer == "ok":
                replies.append(Message(RecordDict(), reply_to=message))
            else:
                reply = Message(Error(int(str(answer)), "why"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink speaks for the node
                replies.append(reply)
        return replies

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.online)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("holds all replies")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windowed_grid, "_NETWORK", 0.001)
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower sets them in its processes
        monkeypatch.setattr(TaskIdentity, name, 1)


def ask(nodes: Nodes, timeout: float | None = 5.0, **settings: Any) -> list[tuple[int, int | None]]:
    """Node and error code of each reply, in order of arrival."""
    messages = [Message(RecordDict(), node, MessageType.TRAIN) for node in nodes.scripts]
    replies = WindowedGrid(nodes, RunSettings(**settings)).send_and_receive(messages, timeout=timeout)
    return [(reply.metadata.src_node_id, reply.error.code if reply.has_error() else None) for reply in replies]


@pytest.mark.parametrize(("window", "most"), [(1, 1), (3, 3), (50, 20), (0, 20)])
def test_no_more_clients_than_the_window_are_unanswered(window: int, most: int) -> None:
    nodes = Nodes({100 + n: ["ok"] for n in range(20)})
    assert sorted(ask(nodes, window=window)) == [(100 + n, None) for n in range(20)]
    assert nodes.most_flying == most


def test_a_free_place_is_filled_before_the_reply_is_worked_on() -> None:
    nodes = Nodes({100 + n: ["ok"] for n in range(6)})
    messages = [Message(RecordDict(), node, MessageType.TRAIN) for node in nodes.scripts]
    replies = WindowedGrid(nodes, RunSettings(window=2)).send_and_receive(messages, timeout=5.0)
    for taken in range(1, 5):
        next(iter(replies))
        assert len(nodes.pushed) == min(6, taken + 2)


@pytest.mark.parametrize("code", [ErrorCode.UNKNOWN, ErrorCode.CLIENT_APP_CRASHED, ErrorCode.NODE_UNAVAILABLE])
def test_a_client_that_was_lost_is_asked_again_and_counts_once(code: int) -> None:
    nodes = Nodes({100: ["ok"], 101: [code, code, "ok"], 102: ["ok"]})
    assert sorted(ask(nodes, retries=2)) == [(100, None), (101, None), (102, None)]
    assert nodes.pushed.count(101) == 3


def test_a_client_is_not_asked_again_for_ever() -> None:
    nodes = Nodes({100: [ErrorCode.UNKNOWN] * 9, 101: ["ok"]})
    assert sorted(ask(nodes, retries=2)) == [(100, ErrorCode.UNKNOWN), (101, None)]
    assert nodes.pushed.count(100) == 3


def test_a_client_that_raised_is_not_asked_again() -> None:
    nodes = Nodes({100: [ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ok"]})
    assert ask(nodes) == [(100, ErrorCode.CLIENT_APP_RAISED_EXCEPTION)]


def test_a_lost_client_is_waited_for_while_its_node_is_away() -> None:
    class Returning(Nodes):
        looks = 0

        def get_node_ids(self) -> Iterable[int]:
            self.looks += 1
            self.online = {100} if self.looks > 5 else set()
            return sorted(self.online)

    nodes = Returning({100: [ErrorCode.NODE_UNAVAILABLE, "ok"]})
    assert ask(nodes, wait_nodes_seconds=5.0) == [(100, None)]
    assert nodes.looks > 5


def test_a_client_whose_node_stays_away_is_given_up_with_flowers_error() -> None:
    nodes = Nodes({100: [ErrorCode.NODE_UNAVAILABLE, "ok"], 101: ["ok"]})
    nodes.online = {100, 101}

    def leave() -> Iterable[int]:
        return [101]

    nodes.get_node_ids = leave  # type: ignore[method-assign]
    assert sorted(ask(nodes, wait_nodes_seconds=0.05)) == [(100, ErrorCode.NODE_UNAVAILABLE), (101, None)]


def test_a_node_that_left_before_it_was_asked_does_not_stop_the_others() -> None:
    nodes = Nodes({100: ["ok"], 101: ["ok"]})
    nodes.online = {101}
    assert ask(nodes, wait_nodes_seconds=0.05) == [(101, None)]


def test_at_the_deadline_the_others_are_given_up() -> None:
    stuck: list[bool] = []
    nodes = Nodes({100: ["ok"], 101: [None], 102: ["ok"]})
    messages = [Message(RecordDict(), node, MessageType.TRAIN) for node in nodes.scripts]
    grid = WindowedGrid(nodes, RunSettings(), lambda: stuck.append(True))
    start = time.monotonic()
    replies = [reply.metadata.src_node_id for reply in grid.send_and_receive(messages, timeout=0.2)]
    assert 0.2 <= time.monotonic() - start < 2.0
    assert sorted(replies) == [100, 102]
    assert stuck == [True]


def test_nobody_is_ended_when_all_answered() -> None:
    stuck: list[bool] = []
    nodes = Nodes({100: ["ok"]})
    grid = WindowedGrid(nodes, RunSettings(), lambda: stuck.append(True))
    messages = [Message(RecordDict(), 100, MessageType.TRAIN)]
    assert len(list(grid.send_and_receive(messages, timeout=1.0))) == 1
    assert stuck == []
