"""Serialise the model once for all simulated clients.

Flower 1.41 and 1.42 serialise each message of a simulation into Ray's object store. A model of 23 MB then costs 23 MB
of copying and of shared memory for every client. `share_arrays` makes messages with the same arrays refer to one object
in the store. The other parts of a message are not shared.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import ray
from flwr.app import ArrayRecord, Message


class Broadcast(ArrayRecord):
    """Arrays that are sent to the workers as a reference after `share` was called. A client gets a plain record."""

    def __init__(self, arrays: ArrayRecord) -> None:
        super().__init__(array_dict=dict(arrays))
        self._lock = threading.Lock()
        self._reference: Any = None

    def share(self) -> None:
        """Put the arrays into Ray's object store, where they stay as long as this object exists.

        This must not happen while the record is pickled: Ray would then not track the reference, and never drop it.
        """
        with self._lock:
            if self._reference is None:
                self._reference = ray.put(ArrayRecord(array_dict=dict(self)))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle the reference, or the arrays as long as there is no reference."""
        return (ArrayRecord, (dict(self),)) if self._reference is None else (ray.get, (self._reference,))


def share_arrays(messages: Iterable[Message]) -> None:
    """Replace array records that several messages hold by one `Broadcast`."""
    shared: dict[int, tuple[ArrayRecord, Broadcast]] = {}
    for message in messages:
        for name, arrays in message.content.array_records.items():
            if isinstance(arrays, Broadcast):
                continue  # this message's content is also that of another one, which was handled before
            # The record is kept beside its id, because Python could otherwise give the id to another object.
            _, message.content[name] = shared.setdefault(id(arrays), (arrays, Broadcast(arrays)))
