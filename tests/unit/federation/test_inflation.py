"""A site that sends objects which Flower cannot turn into a message costs its own upload and nothing else.

The grid is Flower's grid of a deployment, and the hostile objects pass the check that the SuperLink makes. The HTTP
client alone is replaced, by a table of objects.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedmitr_flwr.federation.collection import Collection
from fedmitr_flwr.federation.exchange import inflation, windowed_grid
from fedmitr_flwr.federation.exchange.windowed_grid import WindowedGrid
from fedmitr_flwr.federation.uploads.records import encode_state
from fedmitr_flwr.federation.uploads.store import UploadStore
from fedmitr_flwr.settings import RunSettings

INITIAL = {"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)}
Reply = tuple[Any, dict[str, bytes], ObjectTree]
Site = Callable[[Message], Reply]
HONEST_ARRAY = {"dtype": "float32", "shape": [3, 4], "stype": "numpy.ndarray", "arraychunk_ids": [0]}


def content(name: str) -> RecordDict:
    return RecordDict(
        {
            "config": ConfigRecord({"digest": "D", "client": name, "dtype": "fp32"}),
            "metrics": MetricRecord({"num-examples": 10, "loss": 0.5, "accuracy": 0.5}),
            "arrays": encode_state({key: value + 0.1 for key, value in INITIAL.items()}),
        }
    )


def answer(name: str, asked: Message) -> Message:
    reply = Message(content(name), reply_to=asked)
    reply.metadata.__dict__["_src_node_id"] = asked.metadata.dst_node_id
    return reply


def honest(name: str) -> Site:
    def site(asked: Message) -> Reply:
        reply = answer(name, asked)
        proto, tree = message_to_proto(reply), get_object_tree(reply)
        proto.metadata.message_id = tree.object_id
        return proto, {key: value.deflate() for key, value in get_all_nested_objects(reply).items()}, tree

    return site


def stored(kind: str, children: list[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


ARRAYS: dict[str, bytes] = {
    "no chunk ids": json.dumps({**HONEST_ARRAY, "arraychunk_ids": None}).encode(),
    "index out of range": json.dumps({**HONEST_ARRAY, "arraychunk_ids": [7]}).encode(),
    "index is a word": json.dumps({**HONEST_ARRAY, "arraychunk_ids": ["a"]}).encode(),
    "not JSON": b"{",
    "a list": b"[1]",
    "not UTF-8": b"\xff\xfe{}",
    "deep JSON": b"[" * 100_000,
    "shape is a number": json.dumps({**HONEST_ARRAY, "shape": 5}).encode(),
    "dtype is a number": json.dumps({**HONEST_ARRAY, "dtype": 5}).encode(),
    "a megabyte five thousand times": json.dumps({**HONEST_ARRAY, "arraychunk_ids": [0] * 5000}).encode(),
}
OTHERS = ["no array named", "metrics no protobuf", "config no protobuf", "a record is a chunk", "a child is missing"]
OTHERS += ["no message", "too many objects", "too many bytes", "an object is missing"]


def hostile(kind: str) -> Site:
    def site(asked: Message) -> Reply:
        reply = answer("evil", asked)
        records = {
            key: next(iter(get_all_nested_objects(reply.content[key]).values())) for key in ("config", "metrics")
        }
        chunk = stored("ArrayChunk", [], b"x" * 1_000_000)
        array = stored("Array", [get_object_id(chunk)], ARRAYS.get(kind, json.dumps(HONEST_ARRAY).encode()))
        names = {} if kind == "no array named" else {"head.weight": get_object_id(array)}
        record = stored("ArrayRecord", [get_object_id(array)], json.dumps(names).encode())
        config, metrics = records["config"].deflate(), records["metrics"].deflate()
        if kind == "metrics no protobuf":
            metrics = stored("MetricRecord", [], b"\xff\xff\xff")
        if kind == "config no protobuf":
            config = stored("ConfigRecord", [], b"\xff\xff\xff")
        parts = {"config": config, "metrics": metrics, "arrays": record}
        if kind == "a record is a chunk":
            parts["extra"] = chunk
        ids = {key: get_object_id(value) for key, value in parts.items()}
        named = [ids["arrays"]] if kind == "a child is missing" else list(dict.fromkeys(ids.values()))
        body = stored("RecordDict", named, json.dumps(ids).encode())
        (before,) = reply.children or {}
        whole = reply.deflate().replace(before.encode(), get_object_id(body).encode())
        if kind == "no message":
            whole = body
        objects = {get_object_id(value): value for value in (chunk, array, record, config, metrics, body, whole)}
        more = {"too many objects": 3000, "too many bytes": 80}.get(kind, 0)
        for number in range(more):
            extra = stored("ArrayChunk", [], f"{number:08}".encode() * (1 if kind == "too many objects" else 125_000))
            objects[get_object_id(extra)] = extra
        for value in objects.values():
            validate_object_content(value)
        tree = ObjectTree(object_id=get_object_id(whole), children=[ObjectTree(object_id=name) for name in objects])
        if kind == "an object is missing":
            tree = ObjectTree(object_id=get_object_id(whole))
        proto = message_to_proto(reply)
        proto.metadata.message_id = get_object_id(whole)
        return proto, objects, tree

    return site


class Client:
    """Stands in for Flower's HTTP client: the sites answer when their replies are asked for."""

    def __init__(self, sites: dict[int, Site]) -> None:
        self.sites, self.sent, self.objects = sites, dict[str, Message](), dict[str, bytes]()

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802 - Flower's name
        asked = [self.sent.pop(name) for name in request.message_ids if name in self.sent]
        replies = [self.sites[message.metadata.dst_node_id](message) for message in asked]
        for _, objects, _ in replies:
            self.objects.update(objects)
        return PullAppMessagesResponse(
            messages_list=[proto for proto, _, _ in replies], message_object_trees=[tree for _, _, tree in replies]
        )

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        body = self.objects[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=body)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        pass


class SiteGrid(HttpGrid):
    def __init__(self, sites: dict[int, Site]) -> None:
        super().__init__(token="x")
        self._client = Client(sites)  # type: ignore[assignment]
        self._run = SimpleNamespace(run_id=1)  # type: ignore[assignment]

    def push_messages(self, messages: Any) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self._client.sent[message.object_id] = message  # type: ignore[union-attr]
            ids.append(message.object_id)
        return ids

    def get_node_ids(self) -> list[int]:
        return list(self._client.sites)  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windowed_grid, "_NETWORK", 0.01)
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower sets them in its processes
        monkeypatch.setattr(TaskIdentity, name, 1)


def collect(folder: Path, sites: dict[int, Site], arrays: dict[str, torch.Tensor]) -> tuple[dict[str, int], list[str]]:
    store = UploadStore(folder, INITIAL, 3)
    messages = [
        Message(
            RecordDict({"config": ConfigRecord({"n": str(node)}), "arrays": encode_state(arrays)}),
            node,
            MessageType.TRAIN,
            ttl=100.0,
        )
        for node in sites
    ]
    grid = WindowedGrid(SiteGrid(sites), RunSettings())
    counts = Collection(store, "D", histograms=False).take(grid.send_and_receive(messages, timeout=30.0), len(sites))
    return counts.as_dict(), [upload.client for upload in store.uploads()]


@pytest.mark.parametrize("kind", [*ARRAYS, *OTHERS])
def test_a_malformed_reply_is_one_failed_upload(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedmitr.collection")
    monkeypatch.setattr(inflation, "_SPARE_BYTES", 20 * 2**20)
    sites = {1: honest("north"), 2: hostile(kind), 3: honest("south"), 4: honest("east")}
    counts, clients = collect(tmp_path, sites, INITIAL)
    assert clients == ["east", "north", "south"]
    assert counts == {"asked": 4, "accepted": 3, "refused": 0, "failed": 1, "empty": 0}
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "node 2 failed" in line
    assert "malformed" in line or kind == "an object is missing"


def test_nothing_is_joined_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = []
    flower = inflation._flower_inflate
    monkeypatch.setattr(inflation, "_flower_inflate", lambda *args, **kw: (joined.append(1), flower(*args, **kw))[1])
    sites = {1: honest("north"), 2: hostile("a megabyte five thousand times")}
    assert collect(tmp_path, sites, INITIAL)[1] == ["north"]
    assert len(joined) == 1


def test_a_reply_of_the_size_of_the_model_is_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflation, "_SPARE_BYTES", 10_000)
    arrays = {f"layer.{number}": torch.zeros(200_000) for number in range(4)}
    assert collect(tmp_path, {1: honest("north"), 2: honest("south")}, {**INITIAL, **arrays})[1] == ["north", "south"]


def test_a_reply_that_names_another_message_counts_for_its_own_site(tmp_path: Path) -> None:
    def liar(asked: Message) -> Reply:
        other = Message(RecordDict(), 1, MessageType.TRAIN)
        other.metadata.__dict__["_message_id"] = "of-another-site"
        reply = answer("liar", asked)
        reply.metadata.__dict__["_reply_to_message_id"] = "of-another-site"
        proto, tree = message_to_proto(reply), get_object_tree(reply)
        proto.metadata.message_id = tree.object_id
        return proto, {key: value.deflate() for key, value in get_all_nested_objects(reply).items()}, tree

    counts, clients = collect(tmp_path, {1: honest("north"), 2: liar}, INITIAL)
    assert clients == ["liar", "north"]
    assert counts["failed"] == 0


def test_an_error_of_the_connection_still_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Client, request: Any) -> None:
        raise ConnectionError("the SuperLink is gone")

    monkeypatch.setattr(Client, "PullMessages", broken)
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        collect(tmp_path, {1: honest("north")}, INITIAL)


def test_outside_the_exchange_flower_s_functions_are_unchanged() -> None:
    record = ArrayRecord({})
    assert inflation._inflate(record.object_id, {record.object_id: record.deflate()}) == record
    assert inflation._pull(["a"], lambda name: b"1" * 10) == {"a": b"1" * 10}
