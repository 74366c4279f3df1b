"""Messages to the clients and their replies, a few at a time.

Flower's own grids send everything at once and hold all replies in memory until the last one came (1.41).
`WindowedGrid` keeps a bounded number of clients asked and not answered, hands over each reply as it comes,
stops at the deadline, and asks a client again whose process or connection was lost.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from fedmitr_flwr.federation.exchange.broadcast import share_arrays
from fedmitr_flwr.federation.exchange.replies import Pulls
from fedmitr_flwr.settings import RunSettings

log = logging.getLogger("fedmitr.exchange")

# What Flower says for a client that had no chance to answer. UNKNOWN is a dead worker of a simulation; an exception of
# the ClientApp itself has a code of its own and would only come again.
_LOST = frozenset(
    {
        ErrorCode.UNKNOWN,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)

# Seconds between looks for replies.
_IN_PROCESS = 0.05
_NETWORK = 1.0


@dataclass
class _Asked:
    """A client that is waited for."""

    message: Message
    retries_left: int
    lost: Message | None = None
    give_up: float = 0.0

    @property
    def node(self) -> int:
        return self.message.metadata.dst_node_id

    def again(self) -> None:
        """Replace the message by a new one: Flower takes no message twice."""
        old = self.message.metadata
        self.message = Message(
            self.message.content, old.dst_node_id, old.message_type, ttl=old.ttl, group_id=old.group_id
        )


class WindowedGrid(Grid):
    """A Flower grid whose `send_and_receive` holds one reply at a time.

    Parameters
    ----------
    grid
        The grid of the run.
    settings
        `run.window`, `run.retries` and `run.wait-nodes-seconds`: how long a client that lost its connection has to
        come back.
    on_deadline
        Called when the deadline passes with clients that have not answered.
    """

    def __init__(self, grid: Grid, settings: RunSettings, on_deadline: Callable[[], None] | None = None) -> None:
        self._grid = grid
        self._settings = settings
        self._on_deadline = on_deadline
        self._simulated = isinstance(grid, InMemoryGrid)
        self._pause = _IN_PROCESS if self._simulated else _NETWORK
        self._pulls = Pulls(grid)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages and yield their replies as they come.

        Parameters
        ----------
        messages
            One for each node.
        timeout
            Seconds until no more replies are waited for; None: for ever.

        Yields
        ------
        Message
            The reply of each node that answered; for one that was lost and did not come back, Flower's error. Errors
            that the SuperLink makes itself carry the id of the node they are about.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        messages = list(messages)
        if self._simulated:
            share_arrays(messages)
        waiting = deque(_Asked(message, self._settings.retries) for message in messages)
        window = self._window(len(waiting))
        flying: dict[str, _Asked] = {}
        away: list[_Asked] = []
        while waiting or flying or away:
            self._refill(waiting, flying, away, window)
            answered = False
            for reply in self._pull(flying, end):
                asked = flying.pop(reply.metadata.reply_to_message_id, None)
                if asked is None:
                    continue
                answered = True
                if reply.has_error() and reply.error.code in _LOST and asked.retries_left > 0:
                    self._put_aside(asked, reply, away)
                    continue
                _say_who(reply, asked.node)
                self._refill(waiting, flying, away, window)  # so that clients work while the caller does
                yield reply
                del reply
            yield from self._come_back(away, waiting)
            if time.monotonic() >= end:
                break
            if not answered:
                time.sleep(min(self._pause, max(0.0, end - time.monotonic())))
        if (flying or waiting or away) and self._on_deadline is not None:
            self._on_deadline()

    def _window(self, number: int) -> int:
        if self._settings.window:
            return self._settings.window
        return 2 * len(os.sched_getaffinity(0)) if self._simulated else max(1, number)

    def _refill(self, waiting: deque[_Asked], flying: dict[str, _Asked], away: list[_Asked], window: int) -> None:
        while waiting and len(flying) < window:
            asked = waiting.popleft()
            ids = [name for name in self._grid.push_messages([asked.message]) if name]
            if ids:
                flying[ids[0]] = asked
            else:  # the node left since it was listed
                asked.give_up = asked.give_up or time.monotonic() + self._settings.wait_nodes_seconds
                away.append(asked)

    def _pull(self, flying: dict[str, _Asked], end: float) -> Iterator[Message]:
        """Look once for every message; replies come one at a time."""
        if self._simulated:
            for name in list(flying):
                yield from self._grid.pull_messages([name])
        else:
            yield from self._pulls.look(list(flying), end)

    def _put_aside(self, asked: _Asked, reply: Message, away: list[_Asked]) -> None:
        log.warning("\t├──! node %d was lost (code %d), asking it again", asked.node, reply.error.code)
        log.debug("node %d, in full: %s", asked.node, (reply.error.reason or "")[:10_000])
        asked.retries_left -= 1
        asked.lost, asked.give_up = reply, time.monotonic() + self._settings.wait_nodes_seconds
        asked.again()
        away.append(asked)

    def _come_back(self, away: list[_Asked], waiting: deque[_Asked]) -> Iterator[Message]:
        """Queue lost clients whose node is connected; yield the errors of those that stayed away."""
        if not away:
            return
        online = set(self._grid.get_node_ids())
        for asked in list(away):
            if asked.node in online:
                waiting.append(asked)
            elif time.monotonic() < asked.give_up:
                continue
            elif asked.lost is not None:
                _say_who(asked.lost, asked.node)
                yield asked.lost
            away.remove(asked)

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the grid."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message; Flower demands this deprecated method of every grid."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._grid.pull_messages(message_ids)


def _say_who(reply: Message, node: int) -> None:
    reply.metadata.__dict__["_src_node_id"] = node
