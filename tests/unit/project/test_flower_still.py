"""Flower still behaves as docs/flower.md says: when one of these tests fails, a workaround of ours may go.

Each test shows the behaviour in Flower's own code, without ours. Those that need a whole run are in
tests/integration/test_simulation.py and tests/deployment.
"""

from __future__ import annotations

import inspect
import io
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import requires
from pathlib import Path
from queue import Queue
from typing import Any

import click
import numpy as np
import pytest
import ray
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.cli import local_superlink
from flwr.cli.constant import LOCAL_CONTROL_API_ADDRESS, LOCAL_SUPERLINK_HTTP_API_PORT, LOCAL_SUPERLINK_STARTUP_TIMEOUT
from flwr.cli.utils import collect_files, validate_project_name
from flwr.common.config import flatten_dict, get_fused_config_from_dir, parse_config_args
from flwr.common.constant import FAB_INCLUDE_PATTERNS, ErrorCode
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from flwr.simulation.run_simulation import (
    FLWR_IN_MEMORY_DB_NAME,
    LinkStateFactory,
    NoOpFederationManager,
    ObjectStoreFactory,
    run_serverapp_th,
)
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import _runtime_dependency_install_default
from flwr.superlink.grid import HttpGrid, InMemoryGrid
from flwr.superlink.servicer.fleet.fleet_handlers import push_messages
from packaging.requirements import Requirement
from ray.exceptions import RayActorError

from fedmitr_flwr.federation import workers
from fedmitr_flwr.launch import app_copy, doctor


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower sets them in its processes
        monkeypatch.setattr(TaskIdentity, name, 1)


def message(content: RecordDict | None = None) -> Message:
    return Message(content or RecordDict(), 100, MessageType.TRAIN)


def context() -> Context:
    return Context(1, 100, {"partition-id": 0}, RecordDict(), {})


# Starting and packing


def test_flower_still_installs_an_apps_dependencies_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", raising=False)
    assert _runtime_dependency_install_default()


def test_flower_still_asks_its_local_superlink_through_the_users_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
        assert local_superlink._is_local_superlink_started(), "the proxy was asked, and there is no SuperLink"
        server.shutdown()


def test_flower_still_gives_its_local_superlink_15_seconds() -> None:
    assert LOCAL_SUPERLINK_STARTUP_TIMEOUT <= 15


def test_flower_still_uses_the_ports_that_doctor_looks_at() -> None:
    ports = [int(LOCAL_SUPERLINK_HTTP_API_PORT), int(LOCAL_CONTROL_API_ADDRESS.rpartition(":")[2])]
    assert ports == list(doctor.SUPERLINK_PORTS.values())


def test_flower_still_ignores_a_settings_file_beside_single_keys() -> None:
    assert parse_config_args(["run.toml run.seed=3"]) == {"run.seed": 3}


def test_flower_still_does_not_say_which_keys_were_named(tmp_path: Path) -> None:
    app = '[project]\nname = "a"\nversion = "1"\n[tool.flwr.app]\npublisher = "me"\n'
    app += (
        '[tool.flwr.app.components]\nserverapp = "a:b"\nclientapp = "a:c"\n[tool.flwr.app.config]\ntrain.epochs = 1\n'
    )
    (tmp_path / "pyproject.toml").write_text(app)
    assert get_fused_config_from_dir(tmp_path, {"train.epochs": 1}) == get_fused_config_from_dir(tmp_path, {})
    assert get_fused_config_from_dir(tmp_path, {"train.epochs": "recipe"}) == {"train.epochs": "recipe"}
    with pytest.raises(ValueError, match=r"train\.steps"):
        get_fused_config_from_dir(tmp_path, {"train.steps": 1})


def test_flower_still_takes_no_list_in_a_run_config() -> None:
    with pytest.raises((ValueError, click.ClickException), match="stops"):
        flatten_dict({"inversion": {"stops": [50, 100]}})


def test_flower_still_looks_at_every_file_below_an_app(tmp_path: Path) -> None:
    for name in (".venv/lib/module.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    assert ".venv/lib/module.py" in collect_files(tmp_path)


def test_flower_still_bundles_the_file_types_that_we_copy() -> None:
    kinds = {f"**/*{suffix}" for suffix in app_copy._SUFFIXES} | {"/LICENSE"}
    assert set(FAB_INCLUDE_PATTERNS) == kinds


def test_flower_still_refuses_a_folder_with_an_underscore() -> None:
    with pytest.raises(ValueError, match="invalid"):
        validate_project_name("own_flower_app", "The Flower App directory name")


def test_flower_still_holds_typer_below_0_21() -> None:
    (typer,) = [need for need in map(Requirement, requires("flwr") or []) if need.name == "typer"]
    assert "0.21.0" not in typer.specifier


# Messages and replies


class OneByOne:
    """A grid's `push_messages` and `pull_messages`: each pull brings one reply."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.sent = {str(number): message for number, message in enumerate(messages)}
        for name, sent in self.sent.items():
            sent.metadata.__dict__["_message_id"] = name
        return list(self.sent)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [Message(RecordDict(), reply_to=self.sent[min(message_ids)])]


@pytest.mark.parametrize("kind", [InMemoryGrid, HttpGrid])
def test_flower_still_holds_all_replies_until_the_last_came(kind: type[Grid], monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(OneByOne, kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.pull_interval = 0.0

    monkeypatch.setattr("time.sleep", lambda _: None)
    replies = Few().send_and_receive([message(), message(), message()])
    assert isinstance(replies, list)
    assert len(replies) == 3


def test_flower_still_waits_two_hours_for_arrays_that_do_not_come() -> None:
    assert inspect.signature(pull_objects).parameters["max_time"].default >= 3600


def test_flower_still_demands_the_deprecated_create_message_of_a_grid() -> None:
    assert "create_message" in Grid.__abstractmethods__


def test_flower_still_speaks_for_a_lost_node_as_node_1() -> None:
    asked = message()
    reply = create_message_error_unavailable_res_message(asked.metadata, "node_unavail")
    assert (reply.metadata.src_node_id, reply.error.code) == (1, ErrorCode.NODE_UNAVAILABLE)


def test_flower_still_makes_a_messages_id_of_nothing_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = now()
    monkeypatch.setattr("flwr.app.message.message.now", lambda: moment)
    assert message().object_id == message().object_id


def test_flower_still_takes_a_reply_without_looking_at_the_key_that_signed_it() -> None:
    assert list(inspect.signature(push_messages).parameters) == ["request", "state"]


def test_flower_still_believes_the_header_inside_an_array() -> None:
    stream = io.BytesIO()
    np.save(stream, np.zeros(1000, np.float32))
    array = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=stream.getvalue())
    assert array.numpy().shape == (1000,)


def test_flower_still_joins_a_part_as_often_as_it_is_named() -> None:
    body = json.dumps({"dtype": "uint8", "shape": [1], "stype": "numpy.ndarray", "arraychunk_ids": [0] * 500}).encode()
    part = b"ArrayChunk  1000\0" + bytes(1000)
    name = get_object_id(part)
    array = f"Array {name} {len(body)}".encode() + b"\0" + body
    joined = inflate_object_from_contents("array", {"array": array, name: part})
    assert isinstance(joined, Array)
    assert len(joined.data) == 500_000
    with pytest.raises(KeyError):
        inflate_object_from_contents("array", {"array": array.replace(body, b"{}")})


def test_flower_still_cannot_send_bfloat16() -> None:
    with pytest.raises(TypeError, match="BFloat16"):
        Array(torch.ones(2, dtype=torch.bfloat16))


def test_flower_still_lets_a_client_answer_for_an_hour_unless_told_otherwise() -> None:
    assert inspect.signature(Strategy.start).parameters["timeout"].default == 3600


# Simulation


def test_flower_still_pickles_the_arrays_with_each_message() -> None:
    arrays = ArrayRecord({"weight": Array(np.zeros(100_000, np.float32))})
    assert all(len(pickle.dumps(message(RecordDict({"arrays": arrays})))) > 400_000 for _ in range(2))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> RayBackend:
    """Flower's backend with one worker, which dies when it is given a client."""

    def died(_: object) -> None:
        raise RayActorError

    monkeypatch.setattr(ray, "get", died)
    monkeypatch.setattr(BasicActorPool, "fetch_result_and_return_actor_to_pool", workers._flower_fetch)
    monkeypatch.setattr(BasicActorPool, "submit", workers._flower_submit)
    pool = BasicActorPool.__new__(BasicActorPool)
    pool.pool, pool._future_to_actor = [_Worker()], {}  # type: ignore[list-item]
    backend = RayBackend.__new__(RayBackend)
    backend.pool, backend.app_fn = pool, lambda: None  # type: ignore[assignment, return-value]
    return backend


class _Worker:
    """Gives the pool a future for each client."""

    @property
    def run(self) -> Any:
        return self

    def remote(self, *_: Any) -> str:
        return "future"


def test_flower_still_puts_a_dead_worker_back_into_its_pool(backend: RayBackend) -> None:
    assert backend.pool is not None
    (worker,) = backend.pool.pool
    with pytest.raises(RayActorError):
        backend.process_message(message(), context())
    assert backend.pool.pool == [worker]


class _State:
    """A state with one message for the only node."""

    def __init__(self) -> None:
        self.messages, self.replies = [message()], list[Message]()

    def state(self) -> _State:
        return self

    def get_message_ins(self, node_id: int, limit: int) -> list[Message]:
        return [self.messages.pop()] if self.messages else []

    def store_message_res(self, reply: Message) -> None:
        self.replies.append(reply)


class _Contexts:
    def retrieve_context(self, run_id: int) -> Context:
        return context()

    def update_context(self, run_id: int, context: Context) -> None:
        pass


class _Backend:
    """A backend whose only worker does what a test says."""

    num_workers = 1

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work

    def build(self, app_fn: object) -> None:
        pass

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        self.work()
        return message, context

    def terminate(self) -> None:
        pass


def simulation(work: Callable[[], None]) -> tuple[threading.Thread, _State, threading.Event]:
    """Flower's simulation of one client, in a thread."""
    state, stop = _State(), threading.Event()
    metrics = vce_api.VceMetrics()
    arguments: tuple[Any, ...] = (None, lambda: _Backend(work), {100: 0}, state, {100: _Contexts()}, stop, metrics)
    thread = threading.Thread(target=vce_api.run_api, args=arguments, daemon=True)
    thread.start()
    return thread, state, stop


def wait_until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_flower_still_does_not_end_a_simulation_while_a_client_hangs() -> None:
    begun, released = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        released.wait()

    thread, _, stop = simulation(hang)
    assert begun.wait(20)
    stop.set()  # the ServerApp is done
    thread.join(3)
    assert thread.is_alive()
    released.set()
    thread.join(20)
    assert not thread.is_alive()


def test_flower_still_reports_an_exception_without_the_clients_name_and_first_its_type() -> None:
    def fail() -> None:
        raise ValueError("no images")

    thread, state, stop = simulation(fail)
    wait_until(lambda: state.replies)
    stop.set()
    thread.join(20)
    (reply,) = state.replies
    assert (reply.error.reason or "").startswith("<class 'ValueError'>")


def test_flower_still_connects_simulated_nodes_one_by_one() -> None:
    class Nodes:
        def __init__(self) -> None:
            self.known = list[int]()

        def state(self) -> Nodes:
            return self

        def create_node(self, *_: Any, **__: Any) -> int:
            self.known.append(len(self.known))
            return self.known[-1]

        def acknowledge_node_heartbeat(self, node_id: int, heartbeat_interval: float) -> None:
            assert self.known[-1] == node_id, "a node is there before the next one is made"

    assert list(vce_api._register_nodes(3, Nodes())) == [0, 1, 2]  # type: ignore[arg-type]


def test_flower_still_gives_simulated_nodes_other_ids_in_every_run() -> None:
    def ids() -> set[int]:
        state = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        return set(vce_api._register_nodes(3, state))

    assert ids() & ids() == set()


def test_flower_still_runs_a_simulations_serverapp_in_a_thread() -> None:
    found, app = list[threading.Thread](), ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        found.append(threading.current_thread())

    run_serverapp_th(None, app, context(), None, "", threading.Event(), Queue(), False, Queue()).join(20)  # type: ignore
    assert found != [threading.main_thread()]
    assert len(found) == 1
