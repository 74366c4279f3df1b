"""Send messages to the clients and receive their replies, a bounded number at a time.

Flower's own grids send all messages at once and hold all replies in memory until the last one arrives (1.41 and 1.42).
`WindowedGrid` limits the number of unanswered messages, yields each reply when it arrives, stops at the deadline, and
asks a client again if its process or connection was lost.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid, InMemoryGrid

from fedmitr_flwr.federation.exchange.broadcast import share_arrays
from fedmitr_flwr.federation.exchange.inflation import MalformedReplyError, ReplyLimits, guard
from fedmitr_flwr.federation.exchange.replies import Pulls
from fedmitr_flwr.settings import RunSettings

log = logging.getLogger("fedmitr.exchange")

# Error codes of clients that could not answer. UNKNOWN is a dead worker of a simulation. An exception in the ClientApp
# has another code; such a client is not asked again, because it would raise again.
_LOST = frozenset(
    {
        ErrorCode.UNKNOWN,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)

# Code of the error in place of a malformed reply; as after an exception in the ClientApp, asking again would not help.
_MALFORMED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION

# Seconds between looks for replies.
_IN_PROCESS = 0.05
_NETWORK = 1.0


@dataclass
class _Asked:
    """A client that has been asked and has not answered.

    Attributes
    ----------
    message
        The message to the client.
    retries_left
        Number of times that it may still be asked again.
    lost
        Flower's error, if the client was lost; None before.
    give_up
        Value of `time.monotonic` until which a lost client may connect again.
    """

    message: Message
    retries_left: int
    lost: Message | None = None
    give_up: float = 0.0

    @property
    def node(self) -> int:
        return self.message.metadata.dst_node_id

    def again(self) -> None:
        """Replace the message by a new one with the same content, because Flower sends no message twice."""
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
        `run.window`, `run.retries` and `run.wait-nodes-seconds` are used. The last one is the time in which a client
        that lost its connection may connect again.
    on_deadline
        Called if clients have not answered when the deadline passes.
    """

    def __init__(self, grid: Grid, settings: RunSettings, on_deadline: Callable[[], None] | None = None) -> None:
        self._grid = grid
        self._settings = settings
        self._on_deadline = on_deadline
        self._simulated = isinstance(grid, InMemoryGrid)
        self._pause = _IN_PROCESS if self._simulated else _NETWORK
        self._pulls = Pulls(grid)
        if isinstance(grid, HttpGrid):
            guard()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages and yield their replies as they arrive.

        Parameters
        ----------
        messages
            One for each node.
        timeout
            Seconds to wait for replies; None waits without a limit.

        Yields
        ------
        Message
            The reply of each node that answered; an error in place of a reply that is malformed; and Flower's error for
            each node that was lost and did not connect again. The sender of such an error is set to the id of the node.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        messages = list(messages)
        if self._simulated:
            share_arrays(messages)
        elif messages:
            self._pulls.limits = ReplyLimits.of(messages[0])
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
                _set_sender(reply, asked.node)
                self._refill(waiting, flying, away, window)  # before the yield, so that clients and caller work at once
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
            else:  # the node has disconnected since it was listed
                asked.give_up = asked.give_up or time.monotonic() + self._settings.wait_nodes_seconds
                away.append(asked)

    def _pull(self, flying: dict[str, _Asked], end: float) -> Iterator[Message]:
        """Look once for the reply to each message, and yield the replies one by one."""
        if self._simulated:
            for name in list(flying):
                yield from self._grid.pull_messages([name])
            return
        for name, asked in list(flying.items()):
            try:
                for reply in self._pulls.look([name], end):
                    # The site writes this field; the SuperLink has found the reply by the id of our message.
                    reply.metadata.__dict__["_reply_to_message_id"] = name
                    yield reply
                    del reply
            except MalformedReplyError as problem:
                log.debug("the reply of node %d, in full:", asked.node, exc_info=True)
                yield Message(Error(_MALFORMED, f"its reply is malformed: {problem}"), reply_to=asked.message)

    def _put_aside(self, asked: _Asked, reply: Message, away: list[_Asked]) -> None:
        log.warning("\t├──! node %d was lost (code %d); asking it again", asked.node, reply.error.code)
        log.debug("node %d, in full: %s", asked.node, (reply.error.reason or "")[:10_000])
        asked.retries_left -= 1
        asked.lost, asked.give_up = reply, time.monotonic() + self._settings.wait_nodes_seconds
        asked.again()
        away.append(asked)

    def _come_back(self, away: list[_Asked], waiting: deque[_Asked]) -> Iterator[Message]:
        """Queue lost clients whose node is connected again; yield the errors of those whose time is over."""
        if not away:
            return
        online = set(self._grid.get_node_ids())
        for asked in list(away):
            if asked.node in online:
                waiting.append(asked)
            elif time.monotonic() < asked.give_up:
                continue
            elif asked.lost is not None:
                _set_sender(asked.lost, asked.node)
                yield asked.lost
            away.remove(asked)

    def set_run(self, run: Any) -> None:
        """Set the run of the grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Return the run of the grid."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message; Flower demands this deprecated method of every grid."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages and return their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that have arrived."""
        return self._grid.pull_messages(message_ids)


def _set_sender(reply: Message, node: int) -> None:
    reply.metadata.__dict__["_src_node_id"] = node
