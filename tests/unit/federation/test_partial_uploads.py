"""Uploads that hold a part of the weights: validated, stored small, completed from the common initialisation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict
from safetensors import safe_open
from torch import Tensor

import client_app.app as client_module
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.federation.plan import disk_bytes, plan_memory, upload_bytes
from fedmitr_flwr.federation.uploads.records import check_initial, decode_trusted, encode_state
from fedmitr_flwr.federation.uploads.store import OtherInitialisationError, UploadStore
from fedmitr_flwr.federation.uploads.validation import UploadRefused
from fedmitr_flwr.models.trainable import trained_part
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.runs.directory import RunDirectory
from fedmitr_flwr.runs.tensors import checksum
from fedmitr_flwr.settings import RunConfigValue, Settings, TrainSettings
from fedmitr_flwr.training.upload import ClientTask, ClientUpload
from tests.unit.federation.fake_federation import SPEC, FakeGrid, FakePipeline, changed, counts, honest, install, make
from tests.unit.tiny import tiny_vit

GOOD = {"num_examples": 7, "numbers": {"loss": 0.5, "accuracy": 0.75}}
INITIAL = {name: value.clone() for name, value in tiny_vit().state_dict().items()}
LORA = TrainSettings(trainable="lora", lora_rank=4)
LAST = TrainSettings(trainable="last-1")
DOWN, UP = "blocks.0.attn.qkv.lora_A", "blocks.0.attn.qkv.lora_B"


def upload_of(train: TrainSettings, seed: int = 1, size: float = 0.1) -> dict[str, Tensor]:
    """An upload as a client sends it: the initialisation with noise, and adapters of noise."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in trained_part(train, INITIAL).uploaded(INITIAL).items():
        start = torch.zeros(tensor.shape) if tensor.is_meta else tensor
        found[name] = start + size * torch.randn(tensor.shape, generator=generator)
    return found


def store_in(
    folder: Path, train: TrainSettings, initial: Mapping[str, Tensor] = INITIAL, limit: float = 0.0
) -> UploadStore:
    return UploadStore(folder, initial, 5, max_update_norm=limit, part=trained_part(train, initial))


@pytest.mark.parametrize("train", [LAST, LORA, TrainSettings(trainable="head")], ids=lambda train: train.trainable)
def test_a_small_upload_is_stored_small_and_loaded_whole(tmp_path: Path, train: TrainSettings):
    store, sent = store_in(tmp_path, train), upload_of(train)
    part = store.part
    upload = store.accept("a", sent, **GOOD)
    with safe_open(upload.path, "pt") as file:
        assert set(file.keys()) == set(sent)
    bytes_sent = sum(tensor.numel() * 4 for tensor in sent.values())
    assert bytes_sent < upload.megabytes * 1e6 < bytes_sent + 6000
    for state in (store.load(upload), store.open(upload)):
        assert list(state) == list(INITIAL)
        for name, start in INITIAL.items():
            assert (state[name] is start) == (name not in part.changed)
        assert all(torch.equal(state[name], sent[name]) for name in part.trained)
    if part.adapted:
        merged = INITIAL["blocks.0.attn.qkv.weight"] + 4.0 * sent[UP] @ sent[DOWN]
        assert torch.allclose(store.open(upload)["blocks.0.attn.qkv.weight"], merged, atol=1e-6)


def test_the_states_of_all_clients_share_the_frozen_tensors(tmp_path: Path):
    store = store_in(tmp_path, LAST)
    states = [store.open(store.accept(str(k), upload_of(LAST, k), **GOOD)) for k in range(4)]
    for name in INITIAL:
        distinct = len({id(state[name]) for state in states if name not in store.part.changed})
        assert distinct == (0 if name in store.part.changed else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("train", [LAST, LORA], ids=lambda train: train.trainable)
def test_half_precision_is_completed_in_fp32(tmp_path: Path, train: TrainSettings, dtype: torch.dtype):
    store = store_in(tmp_path, train)
    sent = {name: value.to(dtype) for name, value in upload_of(train).items()}
    state = store.open(store.accept("a", sent, **GOOD))
    assert all(state[name].dtype == torch.float32 for name in INITIAL)
    assert torch.equal(state["norm.weight"], sent["norm.weight"].float())


@pytest.mark.parametrize(
    ("train", "change", "reason"),
    [
        (LAST, {"blocks.0.attn.qkv.weight": torch.zeros(72, 24)}, "1 unexpected tensor: 'blocks.0.attn.qkv.weight'"),
        (LAST, {"pos_embed": INITIAL["pos_embed"]}, "1 unexpected tensor: 'pos_embed'"),
        (LAST, {"backdoor": torch.zeros(1)}, "1 unexpected tensor: 'backdoor'"),
        (LAST, {"head.bias": None}, r"1 missing tensor: 'head\.bias'"),
        (
            LAST,
            {"blocks.1.norm1.weight": torch.zeros(1)},
            r"blocks\.1\.norm1\.weight has shape \(1,\), expected \(24,\)",
        ),
        (LAST, {"head.bias": torch.zeros(5, dtype=torch.float64)}, "float64, expected bfloat16 or float16 or float32"),
        (LAST, {"head.bias": torch.full((5,), torch.nan)}, r"head\.bias holds NaN or Inf"),
        (LORA, {"blocks.0.attn.qkv.weight": torch.zeros(72, 24)}, "1 unexpected tensor: 'blocks.0.attn.qkv.weight'"),
        (LORA, {UP: None}, f"1 missing tensor: '{UP}'"),
        (LORA, {DOWN: torch.zeros(16, 24)}, rf"{DOWN} has shape \(16, 24\), expected \(4, 24\)"),
        (LORA, {DOWN: torch.zeros(2, 24), UP: torch.zeros(72, 2)}, rf"{DOWN} has shape \(2, 24\), expected \(4, 24\)"),
        (LORA, {UP: torch.zeros(4, 72)}, rf"{UP} has shape \(4, 72\), expected \(72, 4\)"),
        (LORA, {DOWN: torch.zeros(4, 24, dtype=torch.int64)}, f"{DOWN} has dtype torch.int64"),
        (LORA, {DOWN: torch.full((4, 24), torch.inf)}, f"{DOWN} holds NaN or Inf"),
        (LORA, {UP: torch.full((72, 4), torch.nan)}, f"{UP} holds NaN or Inf"),
        (LORA, {DOWN: torch.full((4, 24), 1e30), UP: torch.full((72, 4), 1e30)}, "qkv.weight holds NaN or Inf"),
    ],
)
def test_a_hostile_part_is_refused_with_its_reason(
    tmp_path: Path, train: TrainSettings, change: Mapping[str, Tensor | None], reason: str
):
    store = store_in(tmp_path, train)
    sent = {name: value for name, value in {**upload_of(train), **change}.items() if value is not None}
    with pytest.raises(UploadRefused, match=reason):
        store.accept("a", sent, **GOOD)
    assert list(tmp_path.iterdir()) == []


def test_full_weights_are_refused_where_a_part_is_expected(tmp_path: Path):
    with pytest.raises(UploadRefused, match="unexpected tensors: "):
        store_in(tmp_path, LAST).accept("a", INITIAL, **GOOD)
    with pytest.raises(UploadRefused, match="missing tensors: "):
        UploadStore(tmp_path, INITIAL, 5).accept("a", upload_of(LAST), **GOOD)


@pytest.mark.parametrize("train", [LAST, LORA], ids=lambda train: train.trainable)
def test_the_distance_limit_holds_for_the_weights_that_an_upload_makes(tmp_path: Path, train: TrainSettings):
    store = store_in(tmp_path, train, limit=2.0)
    store.accept("near", upload_of(train, size=0.01), **GOOD)
    with pytest.raises(UploadRefused, match=r"from the common initialisation, above run\.max-update-norm = 2 times"):
        store.accept("far", upload_of(train, size=30.0), **GOOD)


def test_a_large_adapter_with_a_small_one_counts_by_its_product(tmp_path: Path):
    store = store_in(tmp_path, LORA, limit=2.0)
    sent = upload_of(LORA)
    for name in store.part.adapters:
        sent[name] = sent[name] * (1e6 if name.endswith("lora_A") else 1e-6)
    store.accept("a", sent, **GOOD)


def test_small_uploads_are_found_again_only_with_the_weights_that_they_were_trained_from(
    tmp_path: Path,
):
    first = store_in(tmp_path, LORA).accept("a", upload_of(LORA), **GOOD)
    assert store_in(tmp_path, LORA).recover() == [first]
    other = {**INITIAL, "pos_embed": INITIAL["pos_embed"] + 1}
    with pytest.raises(OtherInitialisationError, match=r"a\.safetensors was trained from another initialisation"):
        store_in(tmp_path, LORA, other).recover()
    assert store_in(tmp_path, LAST).recover() == []


def test_plan_and_disk_count_small_uploads():
    spec = ImageSpec(tuple("abc"), 3, 224, (0.5,) * 3, (0.5,) * 3)
    base = {"model.name": "vit_tiny_patch16_224", "model.options": "", "train.upload-dtype": "fp16"}
    sizes = {}
    for value in ("all", "last-2", "lora", "head"):
        settings = Settings().replace(**{**base, "train.trainable": value})
        memory = plan_memory(settings, spec, 10, torch.device("cpu")).collection
        sizes[value] = (upload_bytes(settings, spec), disk_bytes(settings, spec, 1000), memory)
    assert sizes["head"][0] == 2 * (3 * 192 + 3)
    for column in range(3):
        values = [sizes[value][column] for value in ("all", "last-2", "lora", "head")]
        assert values == sorted(values, reverse=True)
    added = sizes["all"][1] - sizes["last-2"][1]
    assert added == 1000 * (sizes["all"][0] - sizes["last-2"][0])


def partial_training(task: ClientTask, node_config: Mapping[str, RunConfigValue], name: str) -> ClientUpload:
    """Add the number of the client to all weights, and upload the part that the settings name."""
    step = int(node_config["partition-id"]) + 1
    part = trained_part(task.settings.train, task.initial)
    state = part.cut({key: value + step for key, value in task.initial.items()}, {})
    return ClientUpload(state, step, None, 0.5, 0.75, {"loss": 0.5, "accuracy": 0.75})


class Moving(FakePipeline):
    """Adds 10 to all weights after the average, as a student that trains everything."""

    def __call__(self, inputs: PipelineInputs) -> PipelineResult:
        result = super().__call__(inputs)
        state = {name: value + 10 for name, value in result.state.items()}
        return PipelineResult(state, result.fedavg, *[None] * 4, {})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDirectory]:
    install(monkeypatch)
    monkeypatch.setattr(client_module, "train_client", partial_training)
    with RunDirectory.create(str(tmp_path), "run") as directory:
        yield directory


SLOW = {"run.deadline-seconds": 60.0, "train.share-label-histogram": False, "train.trainable": "last-1"}


def test_each_round_completes_its_uploads_from_the_model_that_it_started_from(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
):
    strategy, _ = make(run, **SLOW)
    strategy.pipeline = pipeline = Moving()
    with caplog.at_level(logging.INFO, logger="fedmitr"):
        strategy.start(FakeGrid([honest] * 2), encode_state(INITIAL), num_rounds=2)
    part = trained_part(strategy.settings.train, INITIAL)
    first, second = pipeline.initial
    assert all(torch.equal(first[name], value) for name, value in INITIAL.items())
    for name in INITIAL:
        moved = INITIAL[name] + (11.5 if name in part.changed else 10)  # clients add 1 and 2, the pipeline 10
        assert torch.allclose(second[name], moved), name
        for client, step in zip(pipeline.clients[1], (1, 2), strict=True):
            expected = second[name] + step if name in part.changed else second[name]
            assert torch.equal(client.state[name], expected), name
            assert name in part.changed or client.state[name] is second[name]
    sent = sum(INITIAL[name].numel() for name in part.trained) * 4 / 1e6
    whole = sum(value.numel() for value in INITIAL.values()) * 4 / 1e6
    told = f"each client uploads {sent:.3g} MB (train.trainable = last-1; all weights have {whole:.3g} MB)"
    assert caplog.text.count(told) == 2
    assert strategy.outcome is not None
    assert sent < strategy.outcome.upload_mb < sent + 0.005
    assert f"upload {strategy.outcome.uploads[0].megabytes:.3g} MB" in caplog.text


def test_an_upload_that_names_other_initial_weights_is_refused(run: RunDirectory, caplog: pytest.LogCaptureFixture):
    def lie(content: RecordDict) -> None:
        content.config_records["config"]["initial"] = "0" * 32

    def forget(content: RecordDict) -> None:
        del content.config_records["config"]["initial"]

    strategy, _ = make(run, **SLOW)
    strategy.start(FakeGrid([honest, changed(lie), changed(forget)]), encode_state(INITIAL))
    assert counts(strategy)["refused"] == 2
    own = checksum(INITIAL)[:12]
    assert f"trained from other initial weights: 000000000000, this run's are {own}" in caplog.text


def test_full_weights_need_no_word_about_the_initial_weights(run: RunDirectory):
    def forget(content: RecordDict) -> None:
        del content.config_records["config"]["initial"]

    strategy, _ = make(run, **{**SLOW, "train.trainable": "all"})
    strategy.start(FakeGrid([changed(forget)]), encode_state(INITIAL))
    assert counts(strategy)["accepted"] == 1


def test_a_client_refuses_initial_weights_that_are_not_the_server_s(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
):
    def damaged(message: Message, partition: int) -> Message:
        arrays = decode_trusted(message.content.array_records["arrays"])
        arrays["pos_embed"][0, 0, 0] += 1
        message.content["arrays"] = encode_state(arrays)
        return honest(message, partition)

    strategy, _ = make(run, **SLOW)
    strategy.start(FakeGrid([honest, damaged]), encode_state(INITIAL))
    assert counts(strategy)["failed"] == 1
    assert "the initial weights differ from the server's: the server's have the checksum" in caplog.text
    with pytest.raises(ValueError, match="differ from the server's"):
        check_initial(INITIAL, "f" * 32)
    assert SPEC.num_classes == 3
