"""The global model as an ONNX file that was checked against torch.

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


_OPSET = 18


def export_onnx(run_model: RunModel, file: Path) -> float:
    """Write the model as ONNX with a free batch size, and check it against torch with ONNX Runtime.

    Input ``images``, ``(B, ch, S, S)`` float32, normalised; output ``logits``, ``(B, C)``. Class names and
    normalisation stand in the file's metadata.

    Returns
    -------
    float
        Largest difference of any logit, on random images of three batch sizes.

    Raises
    ------
    SettingsError
        If a package is missing or the file can't be written.
    RuntimeError
        If the logits differ by more than 1e-4; the file is not kept then.
    """
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK) or file.is_dir():
        raise SettingsError(("--onnx", str(file), "can't be written: must name a file in a folder that can be written"))
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it and says so less plainly
    except ImportError as error:
        allowed = f"needs {error.name}: pip install 'fedmitr-flwr[onnx]', or onnx onnxscript onnxruntime"
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
        raise RuntimeError(f"a logit of the ONNX model differs by {worst:.2g}, allowed are {ONNX_TOLERANCE:g}")
    try:
        with atomic_path(file) as temporary:
            onnx.save(proto, str(temporary))
    except OSError as error:
        raise SettingsError(("--onnx", str(file), f"can't be written: {error.strerror or error}")) from None
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
