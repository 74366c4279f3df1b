"""Use the global model of a finished run: load it, predict, evaluate, export to ONNX.

Letters: B images, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from fedmitr_flwr.data import ImageSet, ImageSpec, Source, load_source
from fedmitr_flwr.data.classes import listed, same_classes
from fedmitr_flwr.data.client_images import site_images
from fedmitr_flwr.data.sources.decode import FileReader, inspect_files
from fedmitr_flwr.data.sources.depth import white_of
from fedmitr_flwr.data.sources.files import exists
from fedmitr_flwr.data.sources.names import shown
from fedmitr_flwr.data.sources.raw import Origin
from fedmitr_flwr.results.evaluate import batches
from fedmitr_flwr.results.finished_run import FinishedRun
from fedmitr_flwr.results.metrics import computed
from fedmitr_flwr.runs.directory import MODEL
from fedmitr_flwr.settings import Settings, SettingsError


@dataclass(frozen=True)
class RunModel:
    """The global model of a run.

    Attributes
    ----------
    model
        In eval mode, on the CPU; takes ``(B, ch, S, S)`` normalised images, gives ``(B, C)`` logits.
    spec
        Classes, size and normalisation.
    """

    model: nn.Module
    spec: ImageSpec

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """``(B, C)`` for ``(B, ch, S, S)`` uint8 images."""
        logits: Tensor = self.model(self.spec.normalise(images))
        return logits.float().softmax(1)


@dataclass(frozen=True)
class Measured:
    """How a model did on an image set; fields as in `evaluate.Evaluation`."""

    accuracy: float
    num_images: int
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    metrics: Mapping[str, float]


def load_run_model(run: FinishedRun) -> RunModel:
    """Load the global model through plain timm.

    Raises
    ------
    SettingsError
        If the run's ``model`` folder is missing or damaged.
    """
    folder = run.path / MODEL
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        source = config["pretrained_cfg"]
        channels, size, _ = source["input_size"]
        names = tuple(config["label_names"])
        spec = ImageSpec(names, channels, size, tuple(source["mean"]), tuple(source["std"]))
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # whatever timm and safetensors raise for files that are not what they were
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingsError(("RUN", str(run.path), f"its model can't be loaded: {said}")) from None
    return RunModel(model.eval(), spec)


def read_images(paths: Sequence[Path], spec: ImageSpec) -> Tensor:
    """Read image files for a model: turned upright, central square, resized, grey or colour.

    The value of white of images of more than 8 bits is decided from all files together, as in training.

    Returns
    -------
    Tensor
        ``(B, ch, S, S)`` uint8.

    Raises
    ------
    SettingsError
        If a file is no image, the model takes neither grey nor colour images, or the value of white is not known.
    """
    first = Origin("IMAGE", shown(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))
    if spec.channels not in (1, 3):
        raise first.error(f"the model takes {spec.channels} channels, image files have 1 or 3")
    found = inspect_files(paths)
    if found.damaged:
        path, why = found.damaged[0]
        raise Origin("IMAGE", shown(path)).error(why)
    try:
        white = white_of(found.peaks)
    except ValueError as error:
        raise first.error(str(error)) from None
    return FileReader(tuple(paths), first, white).read(np.arange(len(paths)), spec.channels, spec.image_size)


def evaluation_images(run: FinishedRun, spec: ImageSpec, data: str | None, split: str) -> ImageSet:
    """Images to evaluate a run's model on.

    Parameters
    ----------
    data
        ``folder:PATH`` or ``npz:PATH``: all labelled images there, classes matched by name; a folder must not have
        several splits. Any other value of `data.source`: a part of that source, which must have the model's classes.
        None: of the run's own source.
    split
        Which part, ``test`` or ``validation``.

    Raises
    ------
    SettingsError
        If there are no such images or classes.
    """
    settings = run.settings()
    kind, _, path = (data or "").partition(":")
    if data is None or kind not in ("folder", "npz"):
        source = _source_of(settings, spec, data)
        return source.test if split == "test" else source.validation
    origin = Origin("--data", data)
    if not exists(Path(path).expanduser(), origin):
        raise origin.error("there is nothing of this name")
    images = site_images(settings.data, origin, spec)
    if len(images) == 0:
        raise SettingsError(("--data", data, "holds no images"))
    return images


def _source_of(settings: Settings, spec: ImageSpec, data: str | None) -> Source:
    """Load the run's own source, or another one brought to what its model takes."""
    if data is None:
        return load_source(settings.data)
    try:
        source = load_source(settings.replace(**{"data.source": data}).data)
    except SettingsError as error:
        raise SettingsError(*(("--data", data, allowed) for _, _, allowed in error.problems)) from None
    if not same_classes(source.spec.class_names, spec.class_names):
        names = f"{listed(source.spec.class_names, 6)}; the model knows {listed(spec.class_names, 6)}"
        raise SettingsError(("--data", data, f"has other classes: {names}"))
    if source.spec.channels != spec.channels and {source.spec.channels, spec.channels} != {1, 3}:
        raise SettingsError(("--data", data, f"has {source.spec.channels} channels, the model takes {spec.channels}"))
    fitted = (
        replace(part, channels=spec.channels, image_size=spec.image_size)
        for part in (source.train, source.validation, source.test)
    )
    return Source(spec, *fitted)


@torch.inference_mode()
def measure(run_model: RunModel, images: ImageSet, device: torch.device, batch_size: int = 250) -> Measured:
    """Evaluate a run's model; images must not be empty."""
    C = run_model.spec.num_classes
    table = torch.zeros(C, C, dtype=torch.int64)
    model, probabilities = run_model.model.to(device), []
    for x, y in batches(images, run_model.spec, batch_size, device):
        logits = model(x)
        probabilities.append(logits.float().softmax(-1).cpu())
        said = logits.argmax(1)
        table += torch.bincount(y * C + said, minlength=C * C).reshape(C, C).cpu()
    hits, counts = table.diagonal().tolist(), table.sum(1).tolist()
    return Measured(
        accuracy=sum(hits) / len(images),
        num_images=len(images),
        per_class=tuple(hit / count if count else None for hit, count in zip(hits, counts, strict=True)),
        confusion=tuple(tuple(row) for row in table.tolist()),
        metrics=computed(torch.from_numpy(images.labels), torch.cat(probabilities)),
    )


def top(probabilities: Tensor, names: Sequence[str], count: int) -> list[tuple[str, float]]:
    """The `count` likeliest classes of one image, ``(C,)`` probabilities, likeliest first."""
    order = probabilities.argsort(descending=True)[:count].tolist()
    return [(names[label], float(probabilities[label])) for label in order]
