"""One content for many simulated clients, serialised once.

Flower 1.41 serialises each message of a simulation into Ray's object store, so that a model of 23 MB costs 23 MB of
copying and of shared memory for every client that gets it. `share_contents` makes messages with the same content refer
to one object there instead.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import ray
from flwr.app import Message, RecordDict


class Broadcast(RecordDict):
    """Records that travel to the workers as a reference, once `share` was called; a client sees plain records."""

    def __init__(self, records: RecordDict) -> None:
        super().__init__(dict(records))
        self._lock = threading.Lock()
        self._reference: Any = None

    def share(self) -> None:
        """Put the records into Ray's object store, where they stay as long as this object.

        Not when it is pickled: Ray would then take the reference for one that nobody keeps track of, and never drop it.
        """
        with self._lock:
            if self._reference is None:
                self._reference = ray.put(RecordDict(dict(self)))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle as the reference, or as the records while there is none."""
        return (RecordDict, (dict(self),)) if self._reference is None else (ray.get, (self._reference,))


def share_contents(messages: Iterable[Message]) -> None:
    """Let messages that hold the same content object hold one `Broadcast` of it."""
    shared: dict[int, tuple[RecordDict, Broadcast]] = {}
    for message in messages:
        content = message.content
        # The original is kept beside its number, which would else be given to another object.
        _, message.content = shared.setdefault(id(content), (content, Broadcast(content)))
