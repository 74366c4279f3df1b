"""Export the global model as an ONNX file and compare its outputs with those of PyTorch.

Letters: B images, C classes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.results.finished_model import RunModel
from fedmitr_flwr.runs.atomic import atomic_path
from fedmitr_flwr.settings import SettingsError

ONNX_TOLERANCE = 1e-4
"""Largest allowed difference between a logit of ONNX Runtime and of PyTorch."""
_OPSET = 18


def export_onnx(run_model: RunModel, file: Path) -> float:
    """Write the model as ONNX with a variable batch size, and compare its logits with those of PyTorch.

    The input ``images`` is ``(B, ch, S, S)`` float32 and normalised; the output ``logits`` is ``(B, C)``. The metadata
    of the file holds class names, mean and standard deviation.

    Returns
    -------
    float
        Largest difference of a logit between ONNX Runtime and PyTorch, on random images in batches of three sizes.

    Raises
    ------
    SettingsError
        If a package is missing or the file cannot be written.
    RuntimeError
        If a logit differs by more than `ONNX_TOLERANCE`; no file is written then.
    """
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK) or file.is_dir():
        raise SettingsError(("--onnx", str(file), "cannot be written: must be a file in an existing, writable folder"))
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it, and its own error message is less clear
    except ImportError as error:
        allowed = f"needs the package {error.name}: pip install 'fedmitr-flwr[onnx]', or onnx onnxscript onnxruntime"
        raise SettingsError(("--onnx", str(file), allowed)) from None
    spec, model = run_model.spec, run_model.model.cpu()
    sizes = [
        torch.randn(
            count, spec.channels, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(count)
        )
        for count in (2, 1, 5)
    ]
    program = torch.onnx.export(
        model,
        (sizes[0],),
        dynamo=True,
        opset_version=_OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for key, value in _metadata(spec).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    worst = max(_difference(session, model, images) for images in sizes)
    if worst > ONNX_TOLERANCE:
        raise RuntimeError(
            f"a logit of the ONNX model differs by {worst:.2g} from PyTorch's; {ONNX_TOLERANCE:g} is allowed"
        )
    try:
        with atomic_path(file) as temporary:
            onnx.save(proto, str(temporary))
    except OSError as error:
        raise SettingsError(("--onnx", str(file), f"cannot be written: {error.strerror or error}")) from None
    return worst


def _metadata(spec: ImageSpec) -> dict[str, str]:
    return {
        "class_names": json.dumps(list(spec.class_names)),
        "mean": json.dumps(list(spec.mean)),
        "std": json.dumps(list(spec.std)),
    }


def _difference(session: Any, model: nn.Module, images: Tensor) -> float:
    with torch.inference_mode():
        expected = model(images)
    (found,) = session.run(["logits"], {"images": images.numpy()})
    return float((torch.from_numpy(found) - expected).abs().max())
