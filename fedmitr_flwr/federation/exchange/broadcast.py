"""One model for many simulated clients, serialised once.

Flower 1.41 serialises each message of a simulation into Ray's object store, so that a model of 23 MB costs 23 MB of
copying and of shared memory for every client that gets it. `share_arrays` makes messages that hold the same arrays
refer to one object there instead; the rest of a message stays its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import ray
from flwr.app import ArrayRecord, Message


class Broadcast(ArrayRecord):
    """Arrays that travel to the workers as a reference, once `share` was called; a client sees a plain record."""

    def __init__(self, arrays: ArrayRecord) -> None:
        super().__init__(array_dict=dict(arrays))
        self._lock = threading.Lock()
        self._reference: Any = None

    def share(self) -> None:
        """Put the arrays into Ray's object store, where they stay as long as this object.

        Not when it is pickled: Ray would then take the reference for one that nobody keeps track of, and never drop it.
        """
        with self._lock:
            if self._reference is None:
                self._reference = ray.put(ArrayRecord(array_dict=dict(self)))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle as the reference, or as the arrays while there is none."""
        return (ArrayRecord, (dict(self),)) if self._reference is None else (ray.get, (self._reference,))


def share_arrays(messages: Iterable[Message]) -> None:
    """Let messages that hold the same array record hold one `Broadcast` of it."""
    shared: dict[int, tuple[ArrayRecord, Broadcast]] = {}
    for message in messages:
        for name, arrays in message.content.array_records.items():
            if isinstance(arrays, Broadcast):
                continue  # of a content that another message holds too
            # The original is kept beside its number, which would else be given to another object.
            _, message.content[name] = shared.setdefault(id(arrays), (arrays, Broadcast(arrays)))
