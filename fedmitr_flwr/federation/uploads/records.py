"""Convert state dicts to Flower arrays and back, without trusting the received bytes.

Flower's ``Array.numpy()`` trusts the header inside the bytes: a header that declares terabytes makes NumPy allocate
them. It does not support bfloat16 at all. Here bfloat16 is sent as uint16, and the config record names the number
format. An array is decoded only if its declared shape and dtype, the header in its bytes and the number of bytes all
agree with what is expected.
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

from fedmitr_flwr.federation.uploads.layout import UPLOAD_DTYPES, Layout, TensorLayout
from fedmitr_flwr.federation.uploads.validation import UploadRefused
from fedmitr_flwr.runs.tensors import checksum
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
    """Convert a state dict into a Flower record, with floating-point tensors in the given number format.

    Raises
    ------
    ValueError
        If a finite value exceeds the range of the format, which is 65504 for fp16.
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


def decode_state(record: ArrayRecord, layout: Layout, dtype: object) -> dict[str, Tensor]:
    """Convert an uploaded record into tensors, after checking it against the expected layout.

    Nothing is allocated before the check. The tensors are views of the record's bytes and must not be written to, so
    that each upload is in memory once. The record is empty afterwards.

    Parameters
    ----------
    record
        The received arrays.
    layout
        The expected names, shapes and dtypes.
    dtype
        Number format that the sender declares: ``fp32``, ``fp16`` or ``bf16``. Any other value is refused.

    Raises
    ------
    UploadRefused
        If the declared layout differs from the expected one, or the bytes differ from the declared layout.
    """
    if not isinstance(dtype, str) or dtype not in UPLOAD_DTYPES:
        raise UploadRefused(f"names the number format {str(dtype)[:40]!r}, expected one of {', '.join(UPLOAD_DTYPES)}")
    layout.check(Layout({key: _declared(key, array, bf16=dtype == "bf16") for key, array in record.items()}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {key: _decode(key, record.pop(key), bf16=dtype == "bf16") for key in layout.tensors}


def decode_trusted(record: ArrayRecord) -> dict[str, Tensor]:
    """Convert trusted arrays, such as the initialisation that the server sends, into new tensors."""
    return {key: torch.from_numpy(array.numpy().copy()) for key, array in record.items()}


def check_initial(initial: Mapping[str, Tensor], expected: str) -> str:
    """Return the checksum of the common initialisation that a client received, if it equals the server's.

    Raises
    ------
    ValueError
        If it differs. The server would complete the client's upload with other weights than the client trained from.
    """
    own = checksum(initial)
    if own != expected:
        raise ValueError(
            f"the initial weights differ from the server's: the server's have the checksum {expected[:12]}, "
            f"those received here {own[:12]}"
        )
    return own


def unguessable(config: Mapping[str, ConfigRecordValues]) -> ConfigRecord:
    """Return a copy of the config with a random entry, so that other sites cannot guess the id of the message.

    The id of a Flower message is the hash of its content. A reply is attributed to a node if it names the id of the
    message to that node: the SuperLink compares the sender of a reply with the receiver of the message, but not with
    the key that signed the reply. Without a random entry a site could compute the id of another site's message and
    answer in its name.
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
    """Decode one array in NumPy's npy format; its declared shape and dtype have been checked before."""
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
    """Return the header that NumPy writes for such an array; comparing it is a hundred times faster than parsing."""
    stream = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()


def _npy_header(key: str, data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
    """Parse an npy header: return shape, memory order, dtype and the offset of the values."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read(stream, max_header_size=_MAX_NPY_HEADER)
    except Exception as error:
        # The header may be hostile: any error of the parser refuses this upload and nothing else.
        raise UploadRefused(f"{key} is not an npy array: {type(error).__name__}") from None
    return shape, fortran_order, dtype, stream.tell()
