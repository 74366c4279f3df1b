"""An upload is exactly a set of weights for the common model with believable numbers, or it is refused."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmitr_flwr.federation.uploads import store as uploads
from fedmitr_flwr.federation.uploads.store import OtherInitialisationError, UploadStore
from fedmitr_flwr.federation.uploads.validation import UploadRefused, natural_key
from fedmitr_flwr.runs.tensors import checksum

NUMBERS = {"loss": 0.5, "accuracy": 0.75}
GOOD = {"num_examples": 7, "numbers": NUMBERS, "histogram": [3, 0, 4]}


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "head.weight": torch.randn(3, 4, generator=generator).to(dtype),
        "head.bias": torch.randn(3, generator=generator).to(dtype),
        "steps": torch.tensor(5),
    }


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    return UploadStore(tmp_path / "uploads", weights(), 3)


def files(store: UploadStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def test_an_upload_comes_back_from_disk_as_it_was(store: UploadStore) -> None:
    upload = store.accept("partition-3", weights(1), **GOOD)
    assert (upload.num_examples, upload.histogram, upload.numbers) == (7, (3, 0, 4), NUMBERS)
    assert files(store) == ["partition-3.safetensors"]
    loaded = store.load(upload)
    assert all(torch.equal(loaded[key], value) for key, value in weights(1).items())


def test_an_upload_can_be_read_tensor_by_tensor(store: UploadStore) -> None:
    upload = store.accept("a", weights(1, torch.float16), **GOOD)
    state = store.open(upload)
    assert dict(state).keys() == weights().keys()
    assert all(torch.equal(state[key], value) for key, value in store.load(upload).items())
    assert state["head.bias"].dtype == torch.float32
    with pytest.raises(KeyError):
        state["more"]


def test_a_new_process_finds_the_uploads_of_the_last(store: UploadStore, caplog: pytest.LogCaptureFixture) -> None:
    for client in ("partition-10", "Site A", "partition-2"):
        store.accept(client, weights(len(client)), **GOOD)
    (store.directory / "broken.safetensors").write_bytes(b"half a file")
    save_file(weights(5), store.uploads()[0].path)
    later = UploadStore(store.directory, weights(), 3)
    assert later.recover() == store.uploads()[1:]
    assert "broken.safetensors is not used" in caplog.text
    with pytest.raises(UploadRefused, match="second upload of client partition-2"):
        later.accept("partition-2", weights(9), **GOOD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_on_disk_and_is_loaded_as_fp32(store: UploadStore, dtype: torch.dtype) -> None:
    upload = store.accept("a", weights(1, dtype), **GOOD)
    with safe_open(upload.path, "pt") as file:
        assert file.get_tensor("head.weight").dtype == dtype
    loaded = store.load(upload)
    assert loaded["head.weight"].dtype == torch.float32
    assert torch.equal(loaded["head.weight"], weights(1, dtype)["head.weight"].float())
    assert loaded["steps"].dtype == torch.int64


def test_the_file_alone_tells_what_the_upload_was(store: UploadStore) -> None:
    upload = store.accept("site A", weights(1), **GOOD)
    with safe_open(upload.path, "pt") as file:
        assert file.metadata() == {
            "client": "site A",
            "num-examples": "7",
            "histogram": "[3, 0, 4]",
            "loss": "0.5",
            "accuracy": "0.75",
            "initial": checksum(weights()),
            "checksum": upload.checksum,
        }


@pytest.mark.parametrize("entry", ["num-examples", "histogram", "accuracy", "client"])
def test_a_changed_number_in_the_header_of_an_upload_is_noticed(
    store: UploadStore, entry: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.accept("a", weights(1), **GOOD).path
    content = path.read_bytes()
    place = content.index(f'"{entry}":"'.encode()) + len(entry) + 4 + (entry == "histogram")
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert UploadStore(store.directory, weights(), 3).recover() == []
    assert "a.safetensors is damaged: its content differs from its checksum" in caplog.text


def test_uploads_of_another_initialisation_are_refused_with_their_name(store: UploadStore) -> None:
    store.accept("a", weights(1), **GOOD)
    other = UploadStore(store.directory, {**weights(), "head.bias": torch.ones(3)}, 3)
    with pytest.raises(OtherInitialisationError, match=r"a\.safetensors was trained from another initialisation"):
        other.recover()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(store: UploadStore, value: float) -> None:
    state = weights()
    state["head.bias"][1] = value
    with pytest.raises(UploadRefused, match=r"head\.bias holds NaN or Inf"):
        store.accept("a", state, **GOOD)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head.weight": torch.zeros(4, 3)}, r"head\.weight has shape \(4, 3\), expected \(3, 4\)"),
        ({"head.weight": torch.zeros(1, 4)}, r"head\.weight has shape \(1, 4\), expected \(3, 4\)"),
        ({"head.bias": torch.zeros(())}, r"head\.bias has shape \(\), expected \(3,\)"),
        ({"head.bias": torch.zeros(3, dtype=torch.float64)}, "float64, expected bfloat16 or float16 or float32"),
        ({"head.bias": torch.zeros(3, dtype=torch.int64)}, r"head\.bias has dtype torch\.int64"),
        ({"head.bias": torch.zeros(3, dtype=torch.complex64)}, r"head\.bias has dtype torch\.complex64"),
        ({"steps": torch.tensor(5.0)}, r"steps has dtype torch\.float32, expected int64"),
        ({"backdoor": torch.zeros(1)}, "1 unexpected tensor: 'backdoor'"),
        ({f"x{n}": torch.zeros(1) for n in range(9)}, "9 unexpected tensors: 'x0', 'x1', 'x2', …"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(
    store: UploadStore, change: Mapping[str, Tensor], reason: str
) -> None:
    with pytest.raises(UploadRefused, match=reason):
        store.accept("a", {**weights(), **change}, **GOOD)


def test_missing_tensors_are_refused(store: UploadStore) -> None:
    state = weights()
    del state["head.bias"]
    with pytest.raises(UploadRefused, match=r"1 missing tensor: 'head\.bias'"):
        store.accept("a", state, **GOOD)
    with pytest.raises(UploadRefused, match="holds no tensors"):
        store.accept("a", {}, **GOOD)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_examples": 0}, "num-examples 0 is not an integer between 1"),
        ({"num_examples": -7}, "num-examples -7"),
        ({"num_examples": 7.0}, r"num-examples 7\.0"),
        ({"num_examples": True}, "num-examples True"),
        ({"num_examples": None}, "num-examples None"),
        ({"num_examples": [7]}, r"num-examples \[7\]"),
        ({"num_examples": 10**30}, "num-examples 1000"),
        ({"histogram": [3, 4]}, r"histogram \[3, 4\] is not a list of 3 counts"),
        ({"histogram": [3, 0, 5]}, "histogram sums to 8, but num-examples is 7"),
        ({"histogram": [10, -3, 0]}, "histogram entry -3"),
        ({"histogram": [3.0, 0.0, 4.0]}, r"histogram entry 3\.0"),
        ({"histogram": 7}, "histogram 7 is not a list"),
        ({"histogram": "304"}, "histogram '304' is not a list"),
        ({"histogram": [0] * 10_000}, "is not a list of 3 counts"),
        ({"numbers": {**NUMBERS, "loss": float("nan")}}, "loss nan is not a finite number"),
        ({"numbers": {**NUMBERS, "loss": None}}, "loss None"),
        ({"numbers": {**NUMBERS, "accuracy": float("inf")}}, "accuracy inf is not a finite number"),
        ({"numbers": {**NUMBERS, "accuracy": 1.5}}, r"accuracy 1\.5 is not between 0 and 1"),
        ({"client": ""}, "client name ''"),
        ({"client": None}, "client name None"),
        ({"client": "x" * 129}, "client name 'xxx"),
        ({"client": "a\nb"}, r"client name 'a\\nb'"),
    ],
)
def test_numbers_that_cannot_be_true_are_refused(store: UploadStore, change: dict[str, object], reason: str) -> None:
    numbers = {"client": "a", **GOOD, **change}
    client = numbers.pop("client")
    with pytest.raises(UploadRefused, match=reason) as refusal:
        store.accept(client, weights(), **numbers)
    assert len(str(refusal.value)) < 300
    assert store.uploads() == []
    assert files(store) == []


def test_a_missing_histogram_is_refused_only_where_it_is_needed(store: UploadStore) -> None:
    withheld = {**GOOD, "histogram": None}
    assert store.accept("a", weights(), **withheld).histogram is None
    needy = UploadStore(store.directory, weights(), 3, needs_histogram=True)
    with pytest.raises(UploadRefused, match="has no label histogram"):
        needy.accept("b", weights(), **withheld)


def test_the_first_upload_of_a_client_stands(store: UploadStore) -> None:
    first = store.accept("a", weights(1), **GOOD)
    with pytest.raises(UploadRefused, match="second upload of client a"):
        store.accept("a", weights(2), **GOOD)
    assert torch.equal(store.load(first)["head.bias"], weights(1)["head.bias"])


def test_the_order_of_arrival_has_no_say(tmp_path: Path) -> None:
    names = ["partition-10", "partition-2", "Köln", "partition-1", "partition-02"]
    orders = []
    for turn, arrival in enumerate((names, names[::-1])):
        store = UploadStore(tmp_path / str(turn), weights(), 3)
        for name in arrival:
            store.accept(name, weights(names.index(name)), **GOOD)
        orders.append([(upload.client, upload.checksum) for upload in store.uploads()])
    assert orders[0] == orders[1]
    assert [name for name, _ in orders[0]] == ["Köln", "partition-1", "partition-02", "partition-2", "partition-10"]


def test_numbers_sort_by_value_and_ties_by_text() -> None:
    assert sorted(["b", "a10", "a9", "7", "a09"], key=natural_key) == ["7", "a09", "a9", "a10", "b"]


def test_no_name_leaves_the_directory_or_takes_the_file_of_another(store: UploadStore) -> None:
    odd = ["../../etc/passwd", "..", "site", "SITE", "site ", "site/", "site\\", "日本", "CON", "s" * 128]
    stem = store.accept("Site", weights(), **GOOD).path.stem
    for name in [*odd, stem, stem.replace("_", "-")]:
        store.accept(name, weights(), **GOOD)
    assert len(files(store)) == len(odd) + 3
    assert all(upload.path.resolve().parent == store.directory.resolve() for upload in store.uploads())


def test_a_write_that_fails_leaves_nothing_and_can_be_tried_again(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(uploads, "write_tensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.accept("a", weights(), **GOOD)
    assert files(store) == []
    assert store.uploads() == []
    monkeypatch.undo()
    assert store.accept("a", weights(), **GOOD) in store.uploads()


def test_a_file_that_changed_after_its_acceptance_is_not_used(store: UploadStore) -> None:
    upload = store.accept("a", weights(1), **GOOD)
    save_file(weights(2), upload.path)
    with pytest.raises(ValueError, match="has changed since the upload of a was accepted"):
        store.load(upload)


def test_the_hash_sees_names_shapes_types_and_values_but_not_the_order() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same = {"b": torch.ones(1), "a": torch.zeros(3, 2).T}
    assert checksum(base) == checksum(same)
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
    ]
    assert len({checksum(state) for state in [base, *others]}) == 5


def test_weights_far_from_the_common_initialisation_are_refused(tmp_path: Path) -> None:
    store = UploadStore(tmp_path, weights(), 3, max_update_norm=2.0)
    near, far, farthest = ({**weights(), "head.weight": weights()["head.weight"] * scale} for scale in (2.0, 9.0, 1e38))
    store.accept("near", near, **GOOD)
    for state in (far, farthest):
        with pytest.raises(
            UploadRefused, match=r"from the common initialisation, above run\.max-update-norm = 2 times"
        ):
            store.accept("far", state, **GOOD)
    UploadStore(tmp_path / "b", weights(), 3).accept("far", farthest, **GOOD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_distance_counts_where_the_length_alone_does_not_settle_it(tmp_path: Path, dtype: torch.dtype) -> None:
    # Twice as long as the initialisation: in its direction this is one norm away from it, against it three.
    store = UploadStore(tmp_path, weights(), 3, max_update_norm=2.0)
    same, opposite = ({key: (scale * value).to(dtype) for key, value in weights().items()} for scale in (2.0, -2.0))
    for state in (same, opposite):
        state["steps"] = torch.tensor(5)
    store.accept("same", same, **GOOD)
    with pytest.raises(UploadRefused, match="from the common initialisation"):
        store.accept("opposite", opposite, **GOOD)
