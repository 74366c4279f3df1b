"""Feature moments on their way from client to pipeline: hostile until validated, and stored with the upload."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MessageType, RecordDict
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.federation.plan import disk_bytes, plan_memory, upload_bytes
from fedmitr_flwr.federation.prepare import prepare
from fedmitr_flwr.federation.quorum import QuorumError
from fedmitr_flwr.federation.uploads import store as uploads
from fedmitr_flwr.federation.uploads.moments import check_moments, decode_moments, longest_feature, moments_layout
from fedmitr_flwr.federation.uploads.records import encode_state
from fedmitr_flwr.federation.uploads.store import UploadStore
from fedmitr_flwr.federation.uploads.validation import UploadRefused
from fedmitr_flwr.models.moments import Moments
from fedmitr_flwr.models.vit import forward_images, head_input
from fedmitr_flwr.runs.directory import COLLECTED, RunDirectory
from fedmitr_flwr.settings import RunConfigValue, Settings, SettingsError
from tests.unit.federation.fake_federation import FakeGrid, changed, counts, fake_moments, honest, make, start
from tests.unit.models.test_moments import ONE_HEAD
from tests.unit.models.test_vit import make as make_vit
from tests.unit.models.test_vit import make_images

pytestmark = pytest.mark.usefixtures("fakes")

SHARED: dict[str, RunConfigValue] = {"train.share-moments": True}
NUMBERS = {"loss": 0.5, "accuracy": 0.75}
CLASSES, WIDTH = 3, 16
LABELS = torch.tensor([0, 0, 0, 0, 2, 2, 2])
FEATURES = 1 + torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0))
GOOD = Moments.of_features(FEATURES, LABELS, CLASSES)
WEIGHTS = {"head.weight": torch.zeros(CLASSES, WIDTH), "head.bias": torch.zeros(CLASSES)}


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    return UploadStore(tmp_path / "uploads", WEIGHTS, CLASSES, needs_moments=True)


def replaced(**tensors: Tensor) -> Moments:
    return Moments(**{**GOOD.tensors(), **tensors})


def edited(name: str, place: int, value: float) -> Moments:
    tensor = GOOD.tensors()[name].clone()
    tensor[place] = value
    return replaced(**{name: tensor})


def products(second: Tensor) -> Moments:
    row, column = torch.triu_indices(WIDTH, WIDTH)
    return replaced(products=second[row, column].float())


def with_negative_eigenvalue() -> Moments:
    """Products with the true trace and one direction of negative variance."""
    values, vectors = torch.linalg.eigh(GOOD.second())
    values[0], values[-1] = values[0] - 1e-3 * values.sum(), values[-1] + 1e-3 * values.sum()
    return products((vectors * values) @ vectors.T)


def the_same_in_every_direction() -> Moments:
    """Positive products with the true trace, too small along the means of the classes."""
    return products(torch.eye(WIDTH, dtype=torch.float64) * GOOD.second().trace() / WIDTH)


def test_moments_of_features_are_accepted() -> None:
    check_moments(GOOD, 7, (4, 0, 3), float(FEATURES.norm(dim=1).max()))
    check_moments(GOOD, 7, None, float("inf"))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("images", [1, 3, 50, 2000])
def test_rounding_to_fp32_never_makes_honest_moments_suspicious(scale: float, images: int) -> None:
    generator = torch.Generator().manual_seed(images)
    labels = torch.randint(0, CLASSES, (images,), generator=generator)
    for offset in (0.0, 30.0):  # a large mean leaves most of the products to cancel
        for rank in (1, WIDTH):
            seen = torch.randn(images, rank, generator=generator) @ torch.randn(rank, WIDTH, generator=generator)
            features = scale * (offset + seen)
            moments = Moments.of_features(features, labels, CLASSES)
            check_moments(moments, images, None, float(features.norm(dim=1).max()))


@pytest.mark.parametrize(
    ("moments", "reason"),
    [
        (edited("sums", 0, float("nan")), "sums hold NaN or Inf"),
        (edited("products", 5, float("inf")), "products hold NaN or Inf"),
        (edited("counts", 0, -4), "a count is -4, which is negative"),
        (edited("counts", 0, 5), "counts do not sum to num-examples, which is 7"),
        (edited("counts", 1, 2**62), "counts do not sum to num-examples, which is 7"),
        (replaced(counts=torch.tensor([3, 0, 4])), "counts differ from the label histogram"),
        (edited("sums", 1, 0.5), "a class without images has a sum that is not zero"),
        (replaced(products=torch.zeros_like(GOOD.products)), "products are smaller than the sums of the classes allow"),
        (replaced(products=-GOOD.products), "products are smaller than the sums of the classes allow"),
        (replaced(sums=1.5 * GOOD.sums), "products are smaller than the sums of the classes allow"),
        (with_negative_eigenvalue(), "products are not those of features"),
        (the_same_in_every_direction(), "products are not those of features"),
        (edited("products", 1, 1e6), "products are not those of features"),
        (replaced(products=1e6 * GOOD.products), "the mean length of the features is .*; this model's are at most"),
        (replaced(products=torch.full_like(GOOD.products, 3e38)), "the mean length of the features is"),
    ],
)
def test_moments_that_no_images_have_are_refused_with_the_reason(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch, moments: Moments, reason: str
) -> None:
    monkeypatch.setattr(uploads, "longest_feature", lambda reference: float(FEATURES.norm(dim=1).max()))
    with pytest.raises(UploadRefused, match=f"^moments: {reason}") as refusal:
        store.accept("a", WEIGHTS, num_examples=7, numbers=NUMBERS, histogram=[4, 0, 3], moments=moments)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 200
    assert store.uploads() == []
    assert list(store.directory.iterdir()) == []


@pytest.mark.parametrize("family", ONE_HEAD)
def test_no_feature_of_a_model_is_longer_than_its_last_norm_allows(family: str) -> None:
    model = make_vit(family)
    images = 100 * make_images(model)
    with torch.no_grad():
        longest = float(head_input(model, forward_images(model, images).features).norm(dim=1).max())
    bound = longest_feature(model.state_dict())
    assert longest <= 1.01 * bound
    assert bound < 20 * longest


def test_without_a_last_norm_features_may_have_any_length() -> None:
    assert longest_feature(WEIGHTS) == float("inf")


def npy(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + bytes(16)


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("sums", Array(torch.zeros(3, 5)), r"sums has shape (3, 5), expected (3, 16)"),
        ("products", Array(torch.zeros(16, 16)), r"products has shape (16, 16), expected (136,)"),
        ("counts", Array(torch.zeros(3)), "counts has dtype torch.float32, expected int64"),
        ("sums", Array(torch.zeros(3, 16, dtype=torch.float16)), "sums has dtype torch.float16, expected float32"),
        ("sums", Array(torch.zeros(3, 16, dtype=torch.float64)), "sums has dtype 'float64'"),
        ("more", Array(torch.zeros(1)), "1 unexpected tensor: 'more'"),
        (
            "products",
            Array(dtype="float32", shape=(136,), stype="numpy.ndarray", data=npy((10**12,))),
            "products declares float32 (136,), but its bytes say float32 (1000000000000,)",
        ),
        (
            "products",
            Array(dtype="float32", shape=(10**12,), stype="numpy.ndarray", data=npy((10**12,))),
            "products has shape (1000000000000,), expected (136,)",
        ),
    ],
)
def test_records_that_lie_are_refused_without_allocating(name: str, array: Array, reason: str) -> None:
    record = encode_state(GOOD.tensors())
    record[name] = array
    tracemalloc.start()
    with pytest.raises(UploadRefused) as refusal:
        decode_moments(record, moments_layout(WEIGHTS))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(refusal.value).startswith(f"moments: {reason}")
    assert peak < 1_000_000


def test_a_record_without_a_tensor_is_refused() -> None:
    record = encode_state({"counts": GOOD.counts, "sums": GOOD.sums})
    for incomplete, reason in ((record, "1 missing tensor: 'products'"), (ArrayRecord(), "holds no tensors")):
        with pytest.raises(UploadRefused, match=f"moments: {reason}"):
            decode_moments(incomplete, moments_layout(WEIGHTS))


def accept(store: UploadStore, client: str = "site A", moments: Moments | None = GOOD) -> uploads.StoredUpload:
    return store.accept(client, WEIGHTS, num_examples=7, numbers=NUMBERS, moments=moments)


def test_moments_come_back_from_disk_as_they_were(store: UploadStore) -> None:
    upload = accept(store)
    found = store.moments(upload)
    assert found is not None
    assert all(torch.equal(value, GOOD.tensors()[name]) for name, value in found.tensors().items())
    assert dict(store.open(upload)).keys() == WEIGHTS.keys()
    again = UploadStore(store.directory, WEIGHTS, CLASSES, needs_moments=True)
    assert again.recover() == [upload]
    assert again.moments(upload) is not None


def test_an_upload_whose_moments_are_gone_or_changed_is_not_recovered(
    store: UploadStore, caplog: pytest.LogCaptureFixture
) -> None:
    files = {client: accept(store, client).path.with_suffix(".moments.safetensors") for client in ("a", "b", "c")}
    files["a"].unlink()
    tensors = load_file(files["b"])
    save_file({**tensors, "sums": tensors["sums"] + 1}, files["b"])
    later = UploadStore(store.directory, WEIGHTS, CLASSES, needs_moments=True)
    assert [upload.client for upload in later.recover()] == ["c"]
    assert "b.moments.safetensors has changed since the upload of b was accepted" in caplog.text
    assert caplog.text.count("is not used") == 2


def test_an_upload_without_moments_is_not_recovered_into_a_run_that_needs_them(
    store: UploadStore, caplog: pytest.LogCaptureFixture
) -> None:
    without = UploadStore(store.directory, WEIGHTS, CLASSES)
    upload = accept(without)
    assert (upload.moments, without.moments(upload)) == (None, None)
    assert [path.name for path in store.directory.iterdir()] == [upload.path.name]
    assert store.recover() == []
    assert "it has no feature moments, which this run needs" in caplog.text


def test_weights_that_are_not_written_leave_no_upload(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = uploads.write_tensors

    def full_disk(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        if not path.name.endswith(".moments.safetensors"):
            raise OSError("no space left")
        write(path, tensors, metadata)

    monkeypatch.setattr(uploads, "write_tensors", full_disk)
    with pytest.raises(OSError, match="no space"):
        accept(store)
    assert store.uploads() == UploadStore(store.directory, WEIGHTS, CLASSES, needs_moments=True).recover() == []


def test_moments_reach_the_pipeline_and_a_resumed_run_reads_them_from_disk(tmp_path: Path) -> None:
    for directory in (RunDirectory.create(str(tmp_path), "run"), None):
        with directory or RunDirectory.resume(tmp_path / "run") as run:
            strategy, pipeline = make(run, **SHARED)
            grid = FakeGrid([honest] * 3)
            start(strategy, grid)
        assert len(grid.sent) == (3 if directory else 0)
        for partition, upload in enumerate(pipeline.clients[0]):
            assert upload.moments is not None
            expected = fake_moments(partition).tensors()
            assert all(torch.equal(value, expected[name]) for name, value in upload.moments.tensors().items())
    (tmp_path / "run" / "uploads" / "round-1" / "partition-1.moments.safetensors").unlink()
    with (
        RunDirectory.resume(tmp_path / "run") as run,
        pytest.raises(ValueError, match="differ from those that were collected"),
    ):
        start(make(run, **SHARED)[0], FakeGrid([honest] * 3))


def test_a_resumed_run_asks_again_for_an_upload_that_lost_its_moments(tmp_path: Path) -> None:
    with RunDirectory.create(str(tmp_path), "run") as run:
        start(make(run, **SHARED)[0], FakeGrid([honest] * 3))
    folder = tmp_path / "run" / "uploads" / "round-1"
    (folder / COLLECTED).unlink()
    (folder / "partition-1.moments.safetensors").unlink()
    with RunDirectory.resume(tmp_path / "run") as run:
        strategy, pipeline = make(run, **SHARED)
        grid = FakeGrid([honest] * 3)
        start(strategy, grid)
    asked = [message for message in grid.sent if message.metadata.message_type == MessageType.TRAIN]
    assert [message.metadata.dst_node_id for message in asked] == [101]
    assert all(upload.moments is not None for upload in pipeline.clients[0])


def withheld(content: RecordDict) -> None:
    del content["moments"]


def negative(content: RecordDict) -> None:
    content.array_records["moments"]["products"] = Array(torch.full((10,), -1.0))


def of_another_client(content: RecordDict) -> None:
    content["moments"] = encode_state(fake_moments(7).tensors())


def as_metrics(content: RecordDict) -> None:
    content["moments"] = content["config"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (withheld, "has no feature moments, which this run needs"),
        (as_metrics, "has no feature moments, which this run needs"),
        (negative, "moments: products are smaller than the sums of the classes allow"),
        (of_another_client, "moments: counts do not sum to num-examples, which is 3"),
    ],
)
def test_a_client_with_bad_moments_is_refused_alone(
    run: RunDirectory, caplog: pytest.LogCaptureFixture, change: Callable[[RecordDict], None], reason: str
) -> None:
    strategy, pipeline = make(run, **SHARED)
    start(strategy, FakeGrid([honest, honest, changed(change)]))
    assert f"upload of node 102 refused: {reason}" in caplog.text
    assert counts(strategy) == {"asked": 3, "accepted": 2, "refused": 1, "failed": 0, "empty": 0}
    assert len(pipeline.clients[0]) == 2
    assert not (run.uploads(1) / "partition-2.moments.safetensors").exists()


def test_counts_must_agree_with_the_histogram_that_the_client_shares(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    def other(content: RecordDict) -> None:
        content.metric_records["metrics"]["histogram"] = [1, 1, 0]

    with pytest.raises(QuorumError):
        start(make(run, **SHARED)[0], FakeGrid([lambda message, _: changed(other)(message, 1)]))
    assert "moments: counts differ from the label histogram" in caplog.text


def test_moments_that_were_not_asked_for_are_neither_sent_nor_kept(run: RunDirectory) -> None:
    sent: list[bool] = []

    def eager(content: RecordDict) -> None:
        sent.append("moments" in content)
        content["moments"] = encode_state(fake_moments(1).tensors())

    strategy, pipeline = make(run)
    start(strategy, FakeGrid([honest, changed(eager)]))
    assert sent == [False]
    assert [upload.moments for upload in pipeline.clients[0]] == [None, None]
    assert not list(run.uploads(1).glob("*.moments.safetensors"))


def test_a_client_without_images_has_no_moments_and_is_not_refused(run: RunDirectory) -> None:
    strategy, pipeline = make(run, **SHARED)
    start(strategy, FakeGrid([honest, lambda message, _: honest(message, 9)]))  # partition 9 has no images
    assert counts(strategy) == {"asked": 2, "accepted": 1, "refused": 0, "failed": 0, "empty": 1}
    assert all(upload.moments is not None for upload in pipeline.clients[0])


def test_disk_and_memory_plans_count_the_moments() -> None:
    spec = ImageSpec(("cat", "dog"), 1, 28, (0.5,), (0.5,))
    plain, shared = Settings(), Settings().replace(**SHARED)
    each = 8 * 2 + 4 * 2 * 64 + 4 * 64 * 65 // 2
    assert upload_bytes(shared, spec) - upload_bytes(plain, spec) == each
    assert disk_bytes(shared, spec, 50) - disk_bytes(plain, spec, 50) == 50 * each
    cpu = torch.device("cpu")
    first, second = (
        plan_memory(settings.replace(**{"run.memory-mb": 9000}), spec, 5000, cpu) for settings in (plain, shared)
    )
    assert second.distillation - first.distillation == pytest.approx(5000 * each / 2**20, abs=2)


def test_a_model_with_two_heads_is_refused_before_any_client_is_asked() -> None:
    settings = Settings().replace(
        **{**SHARED, "data.source": "digits", "data.image-size": 16, "model.name": "deit_tiny_distilled_patch16_224"}
    )
    with pytest.raises(SettingsError, match=r"model\.name = \"deit_tiny_distilled_patch16_224\": has two classifier"):
        prepare(settings, 2)
    prepare(settings.replace(**{"train.share-moments": False}), 2)
