"""Uploads that are broken, hostile or cannot be written: each costs only itself, and nothing is lost."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

import client_app.app as client_module
from fedmitr_flwr.data import load_spec
from fedmitr_flwr.federation import collection
from fedmitr_flwr.federation.collection import failure_reason
from fedmitr_flwr.federation.strategy import FedMITR
from fedmitr_flwr.federation.uploads.records import decode_state, decode_trusted, encode_state
from fedmitr_flwr.federation.uploads.store import StoredUpload, UploadStore
from fedmitr_flwr.runs.directory import RunDirectory
from fedmitr_flwr.runs.observer import Observer
from fedmitr_flwr.settings import RunConfigValue, Settings
from fedmitr_flwr.training.initial import initial_state
from fedmitr_flwr.training.upload import ClientTask, ClientUpload
from tests.unit.federation.fake_federation import (
    INITIAL,
    Behaviour,
    FakeGrid,
    changed,
    counts,
    honest,
    make,
    silent,
    start,
    with_nan,
)

pytestmark = pytest.mark.usefixtures("fakes")

SMALL: dict[str, RunConfigValue] = {
    "data.source": "digits",
    "model.init": "seeded",
    "model.options": "patch_size=2,embed_dim=32,depth=2,num_heads=2",
    "run.min-fraction": 0.0,
    "run.window": 1,
    "inversion.images": 10,
    "inversion.iterations": 6,
    "inversion.stops": "2,4",
    "inversion.fractions": "0.3,0.3",
    "distill.steps": 5,
    "distill.batch-size": 10,
    "distill.noise": 1.0,
}


def test_a_refused_upload_has_no_effect_on_the_model(tmp_path: Path) -> None:
    models = []
    for name, last in (("without", silent), ("with", changed(with_nan))):
        strategy, _ = make(RunDirectory.create(str(tmp_path), name))
        models.append(start(strategy, FakeGrid([honest, honest, last])))
    assert all(torch.equal(models[0][key], models[1][key]) for key in INITIAL)


def test_refused_uploads_leave_the_model_of_all_real_stages_as_it_would_be_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings().replace(**SMALL)
    spec = load_spec(settings.data)
    initial = initial_state(settings, spec)

    def near(task: ClientTask, node_config: object, name: str) -> ClientUpload:
        generator = torch.Generator().manual_seed(len(name) + ord(name[-1]))
        state = {
            key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in task.initial.items()
        }
        return ClientUpload(state, 20, None, 0.5, 0.75, {"loss": 0.5, "accuracy": 0.75})

    def huge(content: RecordDict) -> None:
        content.array_records["arrays"]["head.bias"] = Array(torch.full((10,), 1e9))

    def twice(content: RecordDict) -> None:
        content.config_records["config"]["client"] = "partition-0"

    monkeypatch.setattr(client_module, "train_client", near)
    models = []
    for name, others in (("without", []), ("with", [changed(with_nan), changed(huge), changed(twice)])):
        with RunDirectory.create(str(tmp_path), name) as run:
            strategy = FedMITR(settings, spec, run, device=torch.device("cpu"), observer=Observer())
            arrays = strategy.start(FakeGrid([honest, honest, *others]), encode_state(initial), num_rounds=1).arrays
            assert counts(strategy)["refused"] == len(others)
            models.append(decode_trusted(arrays))
    assert all(torch.equal(models[0][key], value) for key, value in models[1].items())
    assert any(not torch.equal(models[0][key], value) for key, value in initial.items())


def hostile(record: str, **values: object) -> Behaviour:
    def change(content: RecordDict) -> None:
        cast(dict[str, dict[str, object]], content)[record].update(values)

    return changed(change)


def weights(bias: Tensor) -> Behaviour:
    """An upload with another tensor in the place of head.bias."""
    return hostile("arrays", **{"head.bias": Array(bias)})


def raw_bytes(data: bytes, shape: tuple[int, ...] = (3,), dtype: str = "float32") -> Behaviour:
    """An upload with these bytes for head.bias, of which it declares a shape and a type."""
    return hostile("arrays", **{"head.bias": Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)})


def npy(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    """An npy header followed by twelve bytes."""
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + b"\0" * 12


def reduced(*records: str) -> Behaviour:
    def change(content: RecordDict) -> None:
        for record in records:
            del content[record]

    return changed(change)


def replaced(**records: ArrayRecord | MetricRecord | ConfigRecord) -> Behaviour:
    return changed(lambda content: content.update(records))


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (reduced("config", "metrics", "arrays"), "made by other code: None"),
        (reduced("config"), "made by other code: None"),
        (reduced("metrics"), "num-examples None"),
        (reduced("arrays"), "has no arrays"),
        (replaced(arrays=ArrayRecord()), "holds no tensors"),
        (replaced(arrays=MetricRecord({"x": 1})), "has no arrays"),
        (replaced(arrays=ArrayRecord({"head.bias": Array(torch.zeros(3))})), "1 missing tensor: 'head.weight'"),
        (hostile("config", digest="0" * 64), "made by other code: 000000000000, the server runs"),
        (hostile("config", client=7), "client name 7"),
        (hostile("config", client=b"x"), "client name b'x'"),
        (hostile("config", client="partition-0"), "second upload of client partition-0"),
        (hostile("config", dtype=["fp32"]), "names the number format"),
        (hostile("arrays", more=Array(torch.zeros(1))), "1 unexpected tensor: 'more'"),
        (hostile("arrays", **{"head.bias": Array(torch.zeros(1))}), r"head.bias has shape (1,), expected (3,)"),
        (hostile("metrics", **{"num-examples": 0}), "num-examples 0"),
        (hostile("metrics", **{"num-examples": -3}), "num-examples -3"),
        (hostile("metrics", **{"num-examples": 2.0}), "num-examples 2.0"),
        (hostile("metrics", **{"num-examples": [2]}), "num-examples [2]"),
        (hostile("metrics", histogram=[1, 1, 1]), "histogram sums to 3, but num-examples is 2"),
        (hostile("metrics", histogram=[1, 1]), "is not a list of 3 counts"),
        (hostile("metrics", loss=float("nan")), "loss nan"),
        (hostile("metrics", accuracy=2), "accuracy 2.0 is not between"),
        (hostile("metrics", **{"num-examples": 10**18}), "num-examples 1000000000000000000"),
        (hostile("metrics", loss=float("-inf")), "loss -inf"),
        (hostile("metrics", histogram=[3, -1, 0]), "histogram entry -1"),
        (hostile("config", client=""), "client name ''"),
        (hostile("config", client="../../etc/passwd\n"), "is not 1 to 128 printable characters"),
        (weights(torch.full((3,), torch.nan)), "head.bias holds NaN or Inf"),
        (weights(torch.tensor([0.0, torch.inf, 0.0])), "head.bias holds NaN or Inf"),
        (weights(torch.full((3,), -torch.inf)), "head.bias holds NaN or Inf"),
        (weights(torch.full((3,), 1e6)), "from the common initialisation, above run.max-update-norm"),
        (weights(torch.full((3,), 3e38)), "from the common initialisation, above run.max-update-norm"),
        (weights(torch.zeros(3, dtype=torch.float64)), "head.bias has dtype 'float64'"),
        (weights(torch.zeros(3, dtype=torch.int64)), "head.bias has dtype torch.int64"),
        (weights(torch.zeros(3, dtype=torch.bool)), "head.bias has dtype torch.bool"),
        (weights(torch.zeros(4)), "head.bias has shape (4,)"),
        (weights(torch.zeros(())), "head.bias has shape ()"),
        (weights(torch.zeros(3, 1)), "head.bias has shape (3, 1)"),
        (raw_bytes(npy((3,))[:-1]), "has 11 bytes of values, expected 12"),
        (raw_bytes(npy((3,)) + b"0000"), "has 16 bytes of values, expected 12"),
        (raw_bytes(npy((3,))[:20]), "head.bias is not an npy array"),
        (raw_bytes(b""), "head.bias is not an npy array"),
        (raw_bytes(b"\x80\x04cos\nsystem\n."), "head.bias is not an npy array"),
        (raw_bytes(npy((10**13,))), "but its bytes say float32 (10000000000000,)"),
        (raw_bytes(npy((10**13,)), (10**13,)), "head.bias has shape (10000000000000,)"),
        (raw_bytes(npy((3,), "|O")), "but its bytes say object"),
        (raw_bytes(npy((3,), "|O"), (3,), "object"), "head.bias has dtype 'object'"),
        (raw_bytes(npy((3,), ">f4")), "but its bytes say >f4"),
    ],
)
def test_a_broken_reply_costs_only_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, behaviour: Behaviour, reason: str
) -> None:
    models = []
    for name, others in (("without", []), ("with", [behaviour])):
        with RunDirectory.create(str(tmp_path), name) as run:
            strategy, pipeline = make(run, **{"run.max-update-norm": 10.0, "run.window": 1})
            models.append(start(strategy, FakeGrid([honest, *others])))
            accepted = {"asked": 1 + len(others), "accepted": 1, "refused": len(others), "failed": 0, "empty": 0}
            assert counts(strategy) == accepted
            assert [model.num_examples for model in pipeline.clients[0]] == [1]
    assert reason in caplog.text
    assert all(torch.equal(models[0][key], models[1][key]) for key in INITIAL)


@pytest.mark.parametrize("impostor", [100, 101])
def test_an_upload_under_another_sites_name_is_refused_for_that_whoever_is_first(
    run: RunDirectory, caplog: pytest.LogCaptureFixture, impostor: int
) -> None:
    roster = f"partition-0={201 - impostor},site={impostor}"
    strategy, pipeline = make(run, **{"run.roster": roster, "run.window": 1})
    start(strategy, FakeGrid([hostile("config", client="partition-0")] * 2))
    assert f"upload of node {impostor} refused: claims to be partition-0, but node {impostor} is site" in caplog.text
    assert counts(strategy)["accepted"] == 1
    assert [model.num_examples for model in pipeline.clients[0]] == [102 - impostor]


def test_a_reply_that_breaks_the_validation_itself_costs_only_itself(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fragile(record: ArrayRecord, layout: UploadStore, dtype: object) -> dict[str, Tensor]:
        if "odd" in record:
            raise TypeError("unhashable type")
        return decode_state(record, layout, dtype)

    monkeypatch.setattr(collection, "decode_state", fragile)
    strategy, _ = make(run)
    start(strategy, FakeGrid([honest, hostile("arrays", odd=Array(torch.zeros(1)))]))
    assert counts(strategy)["refused"] == 1
    assert "unreadable (TypeError)" in caplog.text


def test_a_full_disk_fails_the_run_and_keeps_what_came(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = UploadStore.accept

    def filling(store: UploadStore, client: object, *args: Any, **kwargs: Any) -> StoredUpload:
        if client == "partition-1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return accept(store, client, *args, **kwargs)

    monkeypatch.setattr(UploadStore, "accept", filling)
    strategy, _ = make(run)
    with pytest.raises(OSError, match="No space left on device"):
        start(strategy, FakeGrid([honest, honest], shuffle=0))
    assert [path.name for path in run.uploads(1).iterdir()] == ["partition-0.safetensors"]


def test_a_reply_is_dropped_before_the_next_but_one_is_taken(run: RunDirectory) -> None:
    strategy, _ = make(run)
    grid = FakeGrid([honest] * 4)
    messages = list(strategy.configure_train(1, encode_state(INITIAL), ConfigRecord(), grid))
    grid.push_messages(messages)
    given: list[Message] = []

    def replies() -> Iterator[Message]:
        for message in messages:
            assert all(len(reply.content) == 0 for reply in given[:-1])
            assert len(list(run.uploads(1).glob("*.safetensors"))) >= len(given) - 1
            given.append(honest(message, len(given)))
            yield given[-1]

    strategy.aggregate_train(1, replies())
    assert len(given) == 4


def test_the_reason_of_a_failure_is_found_in_our_and_in_flowers_replies() -> None:
    assert failure_reason("site: ValueError: x\nTraceback:\n  File\nValueError: x") == "site: ValueError: x"
    assert failure_reason("Traceback (most recent call last):\n  File\nKeyError: 'x'\n\n") == "KeyError: 'x'"
    assert failure_reason("<class 'ray.exceptions.ActorDiedError'>:<'The actor\ndied.'>") == "died.'>"
    assert failure_reason(" \n") == "no reason given"
    assert len(failure_reason("x" * 10_000)) == 500
