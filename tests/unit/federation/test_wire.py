"""Weights survive the wire exactly; bytes that lie about themselves are refused before they cost memory."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from fedmitr_flwr.federation.uploads import records
from fedmitr_flwr.federation.uploads.records import decode_state, decode_trusted, encode_state
from fedmitr_flwr.federation.uploads.store import UploadStore
from fedmitr_flwr.federation.uploads.validation import UploadRefused
from fedmitr_flwr.settings import UploadDtype

STATE = {
    "w": torch.linspace(-2, 2, 12).reshape(3, 4),
    "scalar": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
    "steps": torch.tensor([1, 2]),
}
TERABYTES = 10**12


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    return UploadStore(tmp_path, STATE, 3)


def npy(array: NDArray[np.generic], *, shape: tuple[int, ...] | None = None, allow_pickle: bool = False) -> bytes:
    """Bytes in npy format; with `shape`, the header lies."""
    stream = io.BytesIO()
    if shape is None:
        np.save(stream, array, allow_pickle=allow_pickle)
    else:
        header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(array.tobytes())
    return stream.getvalue()


def raw(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (3, 4), stype: str = "numpy.ndarray") -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


GOOD_BYTES = npy(np.zeros((3, 4), np.float32))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_every_upload_format_round_trips_exactly(store: UploadStore, name: UploadDtype, dtype: torch.dtype) -> None:
    decoded = decode_state(encode_state(STATE, name), store.layout, name)
    for key, value in STATE.items():
        expected = value.to(dtype) if value.is_floating_point() else value
        assert decoded[key].dtype == expected.dtype
        assert torch.equal(decoded[key], expected)


def test_column_major_arrays_keep_their_values(store: UploadStore) -> None:
    record = encode_state(STATE)
    record["w"] = raw(npy(np.asfortranarray(STATE["w"].numpy())))
    assert torch.equal(decode_state(record, store.layout, "fp32")["w"], STATE["w"])


def test_a_header_as_numpy_writes_it_need_not_be_parsed(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record = encode_state(STATE)
    monkeypatch.setattr(records, "_npy_header", None)
    decoded = decode_state(record, store.layout, "fp32")
    assert all(torch.equal(decoded[key], STATE[key]) for key in STATE)


def test_decoding_empties_the_record_so_that_an_upload_is_in_memory_once(store: UploadStore) -> None:
    record = encode_state(STATE)
    decode_state(record, store.layout, "fp32")
    assert len(record) == 0


def test_the_global_model_reaches_a_client_unchanged() -> None:
    decoded = decode_trusted(encode_state(STATE))
    assert all(torch.equal(decoded[key], value) for key, value in STATE.items())


def test_values_beyond_fp16_are_an_error_at_the_sender() -> None:
    with pytest.raises(ValueError, match=r'w exceeds the range of fp16; set train\.upload-dtype to "fp32" or "bf16"'):
        encode_state({"w": torch.tensor([70000.0])}, "fp16")
    assert len(encode_state({"w": torch.tensor([70000.0])}, "bf16")) == 1


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (raw(npy(np.zeros(1, np.float32), shape=(TERABYTES,))), "its bytes say float32"),
        (raw(npy(np.zeros(1, np.float32), shape=(TERABYTES,)), shape=(TERABYTES,)), "has shape"),
        (raw(GOOD_BYTES[:-1]), "has 47 bytes of values, expected 48"),
        (raw(GOOD_BYTES + b"\0" * 4), "has 52 bytes of values, expected 48"),
        (raw(GOOD_BYTES[:40]), "is not an npy array"),
        (raw(b""), "is not an npy array"),
        (raw(b"PK\x03\x04" + GOOD_BYTES), "is not an npy array"),
        (raw(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 0xFFFF), "is not an npy array"),
        (raw(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"{" * 500), "is not an npy array"),
        (raw(b"\x93NUMPY\x09\x00" + GOOD_BYTES[8:]), "is not an npy array"),
        (raw(npy(np.array([{}] * 12).reshape(3, 4), allow_pickle=True)), "its bytes say object"),
        (raw(npy(np.array([{}] * 12).reshape(3, 4), allow_pickle=True), "object"), "has dtype 'object'"),
        (raw(npy(np.zeros((3, 4), ">f4"))), "its bytes say >f4"),
        (raw(npy(np.zeros((3, 4))), "float64"), "has dtype 'float64', which weights cannot have"),
        (raw(npy(np.zeros((3, 4), np.uint16)), "uint16"), "has dtype 'uint16'"),
        (raw(npy(np.zeros((4, 3), np.float32))), r"declares float32 \(3, 4\), but its bytes say float32 \(4, 3\)"),
        (raw(npy(np.zeros((1, 4), np.float32)), shape=(1, 4)), r"has shape \(1, 4\), expected \(3, 4\)"),
        (raw(GOOD_BYTES, stype="pickle"), "is serialised as 'pickle'"),
        (raw(GOOD_BYTES, dtype="x" * 10_000), "has dtype 'xxx"),
    ],
)
def test_bytes_that_lie_are_refused_without_allocating(store: UploadStore, array: Array, reason: str) -> None:
    record = encode_state(STATE)
    record["w"] = array
    tracemalloc.start()
    with pytest.raises(UploadRefused, match=reason) as refusal:
        decode_state(record, store.layout, "fp32")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert len(str(refusal.value)) < 300


def test_uint16_is_bfloat16_only_when_the_sender_says_so(store: UploadStore) -> None:
    with pytest.raises(UploadRefused, match="w has dtype 'uint16'"):
        decode_state(encode_state(STATE, "bf16"), store.layout, "fp16")


@pytest.mark.parametrize("dtype", [None, "fp8", 32, "x" * 1000])
def test_an_unknown_number_format_is_refused(store: UploadStore, dtype: object) -> None:
    with pytest.raises(UploadRefused, match="expected one of fp32, fp16, bf16"):
        decode_state(encode_state(STATE), store.layout, dtype)


def test_missing_extra_and_no_arrays_are_refused(store: UploadStore) -> None:
    missing, extra = encode_state(STATE), encode_state({**STATE, "more": torch.zeros(1)})
    del missing["w"]
    for record, reason in ((missing, "missing tensor: 'w'"), (extra, "unexpected"), (ArrayRecord(), "no tensors")):
        with pytest.raises(UploadRefused, match=reason):
            decode_state(record, store.layout, "fp32")


def test_encoding_leaves_the_state_alone() -> None:
    state: dict[str, Tensor] = {"w": torch.ones(2, requires_grad=True)}
    encode_state(state, "bf16")
    assert state["w"].dtype == torch.float32
