"""Checkpoints of the stages of a round, from which an interrupted run resumes.

The stages themselves do not access files; the pipeline passes them `Checkpoints.batch` and `Progress`. Every file is
written atomically, so a file that exists is complete. Every file has a checksum. A file that differs from its checksum
is named in a warning, and its work is done again, with the same result.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmitr_flwr.runs.atomic import DamagedFileError
from fedmitr_flwr.runs.tensors import read_tensors, write_tensors
from fedmitr_flwr.stages.synthetic import SyntheticImages

log = logging.getLogger("fedmitr.checkpoints")


class Checkpoints:
    """The checkpoints of one round.

    Parameters
    ----------
    directory
        Directory of the files; it is made when the first file is written.
    seconds
        Shortest time between two checkpoints of distillation; 0: one after each step.
    """

    def __init__(self, directory: Path, seconds: float) -> None:
        self.directory = directory
        self.seconds = seconds

    def batch(self, number: int, make: Callable[[], SyntheticImages], device: torch.device) -> SyntheticImages:
        """Return the inversion batch of this number: from disk, or from `make`, and write it to disk."""
        path = self.directory / f"inversion-{number:06d}.safetensors"
        stored = _stored(path)
        if stored is not None:
            return SyntheticImages(**{name: value.to(device) for name, value in stored[0].items()})
        images = make()
        self._write(path, {field.name: getattr(images, field.name) for field in fields(images)})
        return images

    def model(self) -> dict[str, Tensor] | None:
        """Return the state dict of the round's finished global model, or None."""
        stored = _stored(self.directory / "model.safetensors")
        return None if stored is None else stored[0]

    def save_model(self, state: Mapping[str, Tensor]) -> None:
        """Write the finished global model, and delete the checkpoint of distillation."""
        self._write(self.directory / "model.safetensors", state)
        (self.directory / "distill.safetensors").unlink(missing_ok=True)

    def progress(self) -> Progress:
        """Return the checkpoint of distillation."""
        return Progress(self.directory / "distill.safetensors", self.seconds)

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)


class Progress:
    """Checkpoint of a training loop, written at intervals.

    Parameters
    ----------
    path
        The file; each write replaces it.
    seconds
        Shortest time between two writes; 0: write at every call of `offer`.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self.seconds = seconds
        self._written = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the state that was written last, or None."""
        stored = _stored(self.path)
        if stored is None:
            return None
        tensors, about = stored
        ordered = [tensors[str(number)] for number in range(len(tensors))]
        state: dict[str, Any] = _joined(json.loads(about["state"]), ordered)
        log.info("├── distill: resuming after step %d", state["step"])
        return state

    def offer(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Write the state that `make` returns, unless the last write was less than `seconds` ago."""
        if time.monotonic() - self._written < self.seconds:
            return
        tensors: list[Tensor] = []
        text = json.dumps(_parted(make(), tensors))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path, {str(number): value for number, value in enumerate(tensors)}, {"state": text})
        self._written = time.monotonic()


def _stored(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return tensors and metadata of a checkpoint; None if it is missing or damaged."""
    try:
        return read_tensors(path)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        log.warning("\t├──! %s; its work is done again", error)
        return None


def _parted(value: Any, tensors: list[Tensor]) -> Any:
    """Convert nested state into JSON values; tensors are appended to the list, and keys may be numbers."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Mapping):
        return {"mapping": [[key, _parted(part, tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return [_parted(part, tensors) for part in value]
    return value


def _joined(value: Any, tensors: list[Tensor]) -> Any:
    """Rebuild nested state from the values of `_parted`; tuples become lists."""
    if isinstance(value, list):
        return [_joined(part, tensors) for part in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _joined(part, tensors) for key, part in value["mapping"]}
    return value
