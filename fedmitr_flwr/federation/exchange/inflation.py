"""Bound and check what Flower's grid of a deployment makes of a reply before the reply reaches the run.

Flower 1.41 and 1.42 fetch all objects that a site names and join them without a limit: an object of one megabyte that
an array names five thousand times becomes five gigabytes. What their object layer raises for a malformed object ends
the ServerApp. `guard` puts two functions of ours in place of the two that Flower's grid calls. They bound number and
bytes of the objects before they are fetched or joined, and raise `MalformedReplyError` for everything that is wrong
with one reply. Errors of the connection pass unchanged.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content
from flwr.superlink.grid import http_grid

_names_of_flower: Any = http_grid
_flower_pull = _names_of_flower.pull_objects
_flower_inflate = _names_of_flower.inflate_object_from_contents

# What a reply may hold beside the arrays that were sent: records, headers, and arrays of steps before the upload.
_SPARE_BYTES = 64 * 2**20
_SPARE_OBJECTS = 1000


class MalformedReplyError(Exception):
    """A reply cannot be turned into a message; the other replies are not concerned."""


@dataclass(frozen=True)
class ReplyLimits:
    """Limits of one reply.

    Attributes
    ----------
    size
        Largest number of bytes of all its objects, before and after they are joined.
    objects
        Largest number of its objects.
    """

    size: int
    objects: int

    @classmethod
    def of(cls, message: Message) -> ReplyLimits:
        """Return limits for the reply to a message: twice the arrays that were sent, and a fixed amount."""
        arrays = [array for record in message.content.array_records.values() for array in record.values()]
        size = sum(len(array.data) for array in arrays)
        return cls(2 * size + _SPARE_BYTES, 8 * len(arrays) + size // 2**20 + _SPARE_OBJECTS)


_current = threading.local()


@contextmanager
def limited(limits: ReplyLimits | None) -> Iterator[None]:
    """Apply limits to the replies that this thread fetches inside the block."""
    _current.limits = limits
    try:
        yield
    finally:
        del _current.limits


def guard() -> None:
    """Check all replies that Flower's grid fetches in this process inside `limited`."""
    _names_of_flower.pull_objects = _pull
    _names_of_flower.inflate_object_from_contents = _inflate


def _pull(object_ids: Sequence[str], pull_object_fn: Callable[[str], bytes], **options: Any) -> Any:
    """Fetch the objects of a reply, as long as they stay within the limits."""
    limits: ReplyLimits | None = getattr(_current, "limits", None)
    if limits is None:
        return _flower_pull(list(object_ids), pull_object_fn, **options)
    if len(object_ids) > limits.objects:
        raise MalformedReplyError(f"it has {len(object_ids)} objects, at most {limits.objects} are allowed")
    lock, fetched = threading.Lock(), 0

    def counted(object_id: str) -> bytes:
        nonlocal fetched
        content = pull_object_fn(object_id)
        with lock:
            fetched += len(content)
        if fetched > limits.size:
            raise MalformedReplyError(f"it has more than the {limits.size} bytes that are allowed")
        return content

    return _flower_pull(list(object_ids), counted, **options)


def _inflate(object_id: str, object_contents: dict[str, bytes], **options: Any) -> Any:
    """Turn the objects of a reply into a message."""
    limits: ReplyLimits | None = getattr(_current, "limits", None)
    if limits is None:
        return _flower_inflate(object_id, object_contents, **options)
    try:
        _check_joined(object_contents, limits)
        message = _flower_inflate(object_id, object_contents, **options)
    except MalformedReplyError:
        raise
    except Exception as error:  # a site chooses the bytes, so any error of the parsers concerns this reply alone
        raise MalformedReplyError(f"its objects cannot be read ({type(error).__name__})") from error
    if not isinstance(message, Message):
        raise MalformedReplyError(f"it is no message ({type(message).__name__})")
    return message


def _check_joined(object_contents: dict[str, bytes], limits: ReplyLimits) -> None:
    """Refuse arrays whose parts have more bytes together than are allowed, without joining them."""
    total = 0
    for content in object_contents.values():
        kind, children, length = get_object_head_values_from_object_content(content)
        if kind != "Array":
            continue
        parts = json.loads(content[len(content) - length :])["arraychunk_ids"]
        total += sum(len(object_contents[children[part]]) for part in parts)
        if total > limits.size:
            raise MalformedReplyError(f"its arrays have more than the {limits.size} bytes that are allowed")
