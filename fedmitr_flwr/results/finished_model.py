"""Use the global model of a finished run: load it, predict, evaluate, export to ONNX.

Letters: B images, C classes.
"""

from __future__ import annotations

import json
import logging
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
from fedmitr_flwr.data.load import split_origin
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

log = logging.getLogger("fedmitr.results")


@dataclass(frozen=True)
class RunModel:
    """The global model of a run.

    Attributes
    ----------
    model
        Model in eval mode on the CPU. It maps ``(B, ch, S, S)`` normalised images to ``(B, C)`` logits.
    spec
        Class names, image size and normalisation.
    """

    model: nn.Module
    spec: ImageSpec

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return ``(B, C)`` class probabilities of ``(B, ch, S, S)`` uint8 images."""
        logits: Tensor = self.model(self.spec.normalise(images))
        return logits.float().softmax(1)


@dataclass(frozen=True)
class Measured:
    """Accuracy of one model on an image set; the fields are those of `evaluate.Evaluation`."""

    accuracy: float
    num_images: int
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    metrics: Mapping[str, float]


def load_run_model(run: FinishedRun) -> RunModel:
    """Load the global model of a run with timm.

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
    except Exception as error:  # timm and safetensors raise many types of errors for damaged files
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingsError(("RUN", str(run.path), f"its model cannot be loaded: {said}")) from None
    return RunModel(model.eval(), spec)


def read_images(paths: Sequence[Path], spec: ImageSpec) -> Tensor:
    """Read image files as input of the model: upright, the central square, resized, grey or colour.

    For images of more than 8 bits, the value of white is determined from all files together, as in training.

    Returns
    -------
    Tensor
        ``(B, ch, S, S)`` uint8.

    Raises
    ------
    SettingsError
        If a file cannot be read as an image, the model takes neither 1 nor 3 channels, or the value of white is not
        known.
    """
    first = Origin("IMAGE", shown(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))
    if spec.channels not in (1, 3):
        raise first.error(f"the model needs {spec.channels} channels, image files have 1 or 3")
    for path in paths:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise Origin("IMAGE", shown(path)).error("is a pipe, a socket or a device; an image must be a file")
    found = inspect_files(paths)
    if found.damaged:
        path, why = found.damaged[0]
        raise Origin("IMAGE", shown(path)).error(f"cannot be read as an image: {why}" if path.is_file() else why)
    if found.several:
        log.warning("%d files have several pictures; only the first of each is classified", found.several)
    try:
        white = white_of(found.peaks)
    except ValueError as error:
        raise first.error(str(error)) from None
    return FileReader(tuple(paths), first, white).read(np.arange(len(paths)), spec.channels, spec.image_size)


def evaluation_images(run: FinishedRun, spec: ImageSpec, data: str | None, split: str) -> ImageSet:
    """Return the images on which a run's model is evaluated.

    Parameters
    ----------
    data
        ``folder:PATH`` or ``npz:PATH``: the labelled images at this path; classes are matched by name. A folder must
        not have several splits; of a file that marks test data, only these are used. Any other value of `data.source`:
        the part `split` of that source, which must have the model's classes. None: the part `split` of the run's own
        source.
    split
        ``test`` or ``validation``.

    Raises
    ------
    SettingsError
        If there are no images, or if the classes do not fit the model.
    """
    settings = run.settings()
    if data is None or not data.startswith(("folder:", "npz:")):
        source = _source_of(settings, spec, data)
        return source.test if split == "test" else source.validation
    origin = Origin("--data", data)
    if not exists(split_origin(origin)[1], origin):
        raise origin.error("does not exist")
    images = site_images(settings.data, origin, spec)
    if len(images) == 0:
        raise SettingsError(("--data", data, "contains no images"))
    return images


def _source_of(settings: Settings, spec: ImageSpec, data: str | None) -> Source:
    """Load the run's own source, or the source `data` with channels and image size converted for the model."""
    if data is None:
        return load_source(settings.data)
    try:
        source = load_source(settings.replace(**{"data.source": data}).data)
    except SettingsError as error:
        raise SettingsError(*(("--data", data, allowed) for _, _, allowed in error.problems)) from None
    if not same_classes(source.spec.class_names, spec.class_names):
        names = f"{listed(source.spec.class_names, 6)}; the classes of the model are {listed(spec.class_names, 6)}"
        raise SettingsError(("--data", data, f"has other classes than the model: {names}"))
    if source.spec.channels != spec.channels and {source.spec.channels, spec.channels} != {1, 3}:
        raise SettingsError(("--data", data, f"has {source.spec.channels} channels, the model needs {spec.channels}"))
    fitted = (
        replace(part, channels=spec.channels, image_size=spec.image_size)
        for part in (source.train, source.validation, source.test)
    )
    return Source(spec, *fitted)


@torch.inference_mode()
def measure(run_model: RunModel, images: ImageSet, device: torch.device, batch_size: int = 250) -> Measured:
    """Measure the accuracy of a run's model on at least one image."""
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
    """Return names and probabilities of the `count` most probable classes of an image, in descending order.

    Parameters
    ----------
    probabilities
        ``(C,)`` in 0..1.
    names
        C class names.
    """
    order = probabilities.argsort(descending=True)[:count].tolist()
    return [(names[label], float(probabilities[label])) for label in order]
