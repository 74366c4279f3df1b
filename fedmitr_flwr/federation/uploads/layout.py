"""Names, shapes and dtypes of the tensors that an upload must have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmitr_flwr.federation.uploads.validation import UploadRefused, brief
from fedmitr_flwr.settings import UploadDtype

UPLOAD_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ANY_FORMAT = frozenset(UPLOAD_DTYPES.values())


@dataclass(frozen=True)
class TensorLayout:
    """Shape and dtype of a tensor, as declared before its bytes are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """The layout of a state dict.

    Attributes
    ----------
    tensors
        By name.
    formats
        The dtypes in which floating-point tensors may be declared.
    """

    tensors: Mapping[str, TensorLayout]
    formats: frozenset[torch.dtype] = _ANY_FORMAT

    @classmethod
    def of(cls, state: Mapping[str, Tensor], formats: frozenset[torch.dtype] = _ANY_FORMAT) -> Layout:
        """Return the layout of a state dict."""
        return cls({key: TensorLayout(tuple(value.shape), value.dtype) for key, value in state.items()}, formats)

    def size(self, dtype: UploadDtype) -> int:
        """Return the bytes of all values, with floating-point tensors in this number format."""
        return sum(
            math.prod(tensor.shape)
            * (UPLOAD_DTYPES[dtype] if tensor.dtype.is_floating_point else tensor.dtype).itemsize
            for tensor in self.tensors.values()
        )

    def check(self, declared: Layout) -> None:
        """Compare a declared layout with this one, without allocating memory.

        Floating-point tensors may be declared in any of `formats`, all others exactly as they are here.

        Raises
        ------
        UploadRefused
            If tensors are missing or unexpected (the message names up to three), or one has another shape or dtype.
        """
        if not declared.tensors:
            raise UploadRefused("holds no tensors")
        _refuse_names("missing", [key for key in self.tensors if key not in declared.tensors])
        _refuse_names("unexpected", [key for key in declared.tensors if key not in self.tensors])
        for key, expected in self.tensors.items():
            found = declared.tensors[key]
            # Shapes must be equal: (1, 64) instead of (64, 64) would be broadcast in an average without an error.
            if found.shape != expected.shape:
                raise UploadRefused(f"{key} has shape {brief(found.shape)}, expected {expected.shape}")
            allowed = self.formats if expected.dtype.is_floating_point else {expected.dtype}
            if found.dtype not in allowed:
                raise UploadRefused(f"{key} has dtype {found.dtype}, expected {_dtype_names(allowed)}")


def _refuse_names(kind: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(brief(name) for name in names[:3]) + (", …" if len(names) > 3 else "")
        raise UploadRefused(f"{len(names)} {kind} tensor{'s' if len(names) > 1 else ''}: {shown}")


def _dtype_names(dtypes: Set[torch.dtype]) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
