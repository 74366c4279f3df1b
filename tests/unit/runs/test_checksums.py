"""Every changed byte of a stored file is noticed, wherever it lies."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmitr_flwr.data.cache import cached_array, mark, marked
from fedmitr_flwr.pipeline.checkpoints import Checkpoints
from fedmitr_flwr.runs.atomic import DamagedFileError, read_checked_json, write_checked_json
from fedmitr_flwr.runs.tensors import checksum, read_tensors, write_tensors
from fedmitr_flwr.stages.synthetic import SyntheticImages

TENSORS = {
    "weight": torch.randn(5, 7, generator=torch.Generator().manual_seed(1)),
    "half": torch.arange(6).to(torch.bfloat16),
    "steps": torch.tensor([3, -1]),
    "none": torch.zeros(0),
}
ABOUT = {"client": "site \u00e4", "num-examples": "12"}


def flips(content: bytes, count: int) -> list[bytes]:
    chosen = random.Random(7)
    changed = []
    for place in [*range(min(200, len(content))), *(chosen.randrange(len(content)) for _ in range(count))]:
        other = bytearray(content)
        other[place] ^= 1 << chosen.randrange(8)
        changed.append(bytes(other))
    return changed


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_flipped_bit_of_a_safetensors_file_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, ABOUT)
    noticed = 0
    for content in flips(path.read_bytes(), 400):
        (tmp_path / "b.safetensors").write_bytes(content)
        try:
            tensors, about = read_tensors(tmp_path / "b.safetensors")
        except DamagedFileError as error:
            assert error.path == tmp_path / "b.safetensors"  # noqa: PT017 - most flips raise, some change nothing
            noticed += 1
            continue
        assert same(tensors, TENSORS)
        assert {key: about[key] for key in ABOUT} == ABOUT
    assert noticed > 500


@pytest.mark.parametrize("cut", [0, 7, 8, 60, -1])
def test_a_truncated_safetensors_file_is_noticed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, ABOUT)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedFileError, match=r"a\.safetensors cannot be read as safetensors"):
        read_tensors(path)


def test_files_without_a_checksum_and_uploads_of_earlier_versions_are_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "other.safetensors")
    assert same(read_tensors(tmp_path / "other.safetensors")[0], TENSORS)
    save_file(TENSORS, tmp_path / "earlier.safetensors", {**ABOUT, "checksum": checksum(TENSORS)})
    assert same(read_tensors(tmp_path / "earlier.safetensors")[0], TENSORS)


def test_a_flipped_bit_of_a_json_document_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    value = {"clients": {"asked": 3, "accepted": 2}, "rate": 0.1, "bad": float("nan"), "name": "\u00e4", "on": True}
    path = tmp_path / "a.json"
    write_checked_json(path, value)
    expected = {**value, "bad": None}
    assert read_checked_json(path) == expected
    assert json.loads(path.read_text())["clients"] == value["clients"]
    for content in flips(path.read_bytes(), 200):
        path.write_bytes(content)
        try:
            found = read_checked_json(path)
        except DamagedFileError as error:
            assert str(path) in str(error)  # noqa: PT017 - most flips raise, some change nothing
            continue
        assert {key: found.get(key) for key in expected} == expected


def made(seed: int) -> SyntheticImages:
    draw = torch.Generator().manual_seed(seed)
    return SyntheticImages(
        torch.randn(2, 1, 4, 4, generator=draw), torch.tensor([0, 1]), torch.tensor([[0], [1]]), torch.zeros(2)
    )


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_inversion_batch_is_made_again_and_named(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cpu")
    checkpoints = Checkpoints(tmp_path, 0.0)
    first = checkpoints.batch(3, lambda: made(3), device)
    path = tmp_path / "inversion-000003.safetensors"
    content = path.read_bytes()
    path.write_bytes({"flip": content[:-5] + b"?" + content[-4:], "truncate": content[:99], "empty": b""}[damage])
    again = checkpoints.batch(3, lambda: made(3), device)
    assert torch.equal(first.images, again.images)
    assert str(path) in caplog.text
    caplog.clear()
    kept = checkpoints.batch(3, lambda: made(4), device)  # written anew, and read
    assert torch.equal(first.images, kept.images)
    assert caplog.text == ""


def test_a_damaged_array_in_the_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path))
    cached_array("six", lambda: np.arange(6, dtype=np.uint8))
    path = tmp_path / "data" / "six.npy"
    for content in flips(path.read_bytes(), 20):
        path.write_bytes(content)
        assert cached_array("six", lambda: np.arange(6, dtype=np.uint8)).tolist() == [*range(6)]


def test_a_damaged_mark_in_the_cache_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMITR_CACHE", str(tmp_path))
    mark("m", '{"integer": 255}')
    assert marked("m") == '{"integer": 255}'
    path = tmp_path / "marks" / "m"
    for content in flips(path.read_bytes(), 20):
        path.write_bytes(content)
        assert marked("m") is None
