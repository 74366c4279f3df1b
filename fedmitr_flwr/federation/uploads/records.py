"""State dicts as Flower arrays and back, without trusting the bytes.

Flower's own ``Array.numpy()`` believes the header inside the bytes: one that declares terabytes makes
NumPy allocate them, and bfloat16 does not work at all. Here bfloat16 travels as uint16 with
its true type named beside it, and an array is decoded only when what it declares, what its bytes
declare and how many bytes there are all agree with what is expected.
"""

from __future__ import annotations

import io
import math
import secrets
import warnings
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues
from torch import Tensor

from fedmitr_flwr.federation.uploads.store import UPLOAD_DTYPES, TensorLayout, UploadStore
from fedmitr_flwr.federation.uploads.validation import UploadRefused
from fedmitr_flwr.settings import UploadDtype

_SERIALISATION = "numpy.ndarray"
_MAX_NPY_HEADER = 1024
_NUMPY_TO_TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def encode_state(state: Mapping[str, Tensor], dtype: UploadDtype = "fp32") -> ArrayRecord:
    """Turn a state dict into a Flower record, floating-point tensors in the given number format.

    Raises
    ------
    ValueError
        If a finite value does not fit into the format: fp16 ends at 65504.
    """
    arrays = {}
    for key, value in state.items():
        tensor = value.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.to(UPLOAD_DTYPES[dtype])
            if dtype != "fp32" and torch.isinf(tensor).any() and not torch.isinf(value).any():
                raise ValueError(f'{key} exceeds the range of {dtype}; set train.upload-dtype to "fp32" or "bf16"')
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.uint16)
        arrays[key] = Array(tensor.contiguous().numpy())
    return ArrayRecord(arrays)


def decode_state(record: ArrayRecord, store: UploadStore, dtype: object) -> dict[str, Tensor]:
    """Turn an uploaded record into tensors, checked against the store's layout before anything is allocated.

    The record is emptied on the way. The tensors are views of its bytes, so that each upload is in memory once: they
    are only to be read.

    Parameters
    ----------
    record
        Arrays as they came.
    store
        Knows the names, shapes and dtypes to expect.
    dtype
        The number format that the sender names: ``fp32``, ``fp16`` or ``bf16``.

    Raises
    ------
    UploadRefused
        If anything declared differs from what is expected, or the bytes from what is declared.
    """
    if not isinstance(dtype, str) or dtype not in UPLOAD_DTYPES:
        raise UploadRefused(f"names the number format {str(dtype)[:40]!r}, expected one of {', '.join(UPLOAD_DTYPES)}")
    store.check_layout({key: _declared(key, array, bf16=dtype == "bf16") for key, array in record.items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {key: _decode(key, record.pop(key), bf16=dtype == "bf16") for key in store.layout}


def decode_trusted(record: ArrayRecord) -> dict[str, Tensor]:
    """Turn arrays of our own making (the global model on its way to a client) into tensors, in fp32."""
    return {key: torch.from_numpy(array.numpy().copy()) for key, array in record.items()}


def unguessable(config: Mapping[str, ConfigRecordValues]) -> ConfigRecord:
    """Return a config record that makes the id of the message which carries it a secret of sender and receiver.

    A message's id is the hash of its content, and a reply is taken for whose it says it is if it names the id of the
    message to that node (the SuperLink compares a reply's sender with the receiver of what it answers, but not with
    the key that signed it). Without something random in it, one site could work out the id of another's message.
    """
    return ConfigRecord({**config, "nonce": secrets.token_hex(16)})


def _declared(key: str, array: Array, *, bf16: bool) -> TensorLayout:
    if array.stype != _SERIALISATION:
        raise UploadRefused(f"{key} is serialised as {array.stype[:40]!r}, expected {_SERIALISATION!r}")
    known = {**_NUMPY_TO_TORCH, "uint16": torch.bfloat16} if bf16 else _NUMPY_TO_TORCH
    if array.dtype not in known:
        raise UploadRefused(f"{key} has dtype {array.dtype[:40]!r}, which weights cannot have")
    return TensorLayout(tuple(array.shape), known[array.dtype])


def _decode(key: str, array: Array, *, bf16: bool) -> Tensor:
    """Decode one array in NumPy's npy format whose declared shape and dtype were found right."""
    expected = np.dtype(array.dtype)
    plain = _plain_header(expected, tuple(array.shape))
    if array.data.startswith(plain):
        shape, fortran_order, dtype, start = tuple(array.shape), False, expected, len(plain)
    else:
        shape, fortran_order, dtype, start = _npy_header(key, array.data)
    if dtype != expected or shape != array.shape:
        raise UploadRefused(f"{key} declares {array.dtype} {array.shape}, but its bytes say {dtype} {str(shape)[:80]}")
    size = math.prod(shape) * expected.itemsize
    if len(array.data) - start != size:
        raise UploadRefused(f"{key} has {len(array.data) - start} bytes of values, expected {size}")
    flat = np.frombuffer(array.data, expected, offset=start)
    values = flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)
    tensor = torch.from_numpy(np.require(values, requirements=["C", "ALIGNED"]))
    return tensor.view(torch.bfloat16) if bf16 and tensor.dtype == torch.uint16 else tensor


@cache
def _plain_header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bytes:
    """What NumPy itself writes before such an array: to compare is a hundred times faster than to parse."""
    stream = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()


def _npy_header(key: str, data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
    """Return shape, memory order, dtype and the offset of the values."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read(stream, max_header_size=_MAX_NPY_HEADER)
    except Exception as error:
        # The parser meets hostile text: whatever it raises, this upload is not readable, and no more than that.
        raise UploadRefused(f"{key} is not an npy array: {type(error).__name__}") from None
    return shape, fortran_order, dtype, stream.tell()
