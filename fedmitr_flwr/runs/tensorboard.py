"""Write losses, agreement, numbers of kept patches, accuracies and image grids for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fedmitr_flwr.runs.observer import Event, Listener
from fedmitr_flwr.settings import RunSettings, SettingsError

FOLDER = "tensorboard"


def boards(settings: RunSettings, directory: Path) -> list[Listener]:
    """Return the listeners that `run.tensorboard` asks for.

    Raises
    ------
    SettingsError
        If TensorBoard is not installed.
    """
    if not settings.tensorboard:
        return []
    check_tensorboard(settings)
    return [TensorBoard(directory / FOLDER)]


def check_tensorboard(settings: RunSettings) -> None:
    """Raise a `SettingsError` if `run.tensorboard` is set and TensorBoard is not installed."""
    if settings.tensorboard and find_spec("tensorboard") is None:
        allowed = "needs the package tensorboard; install it with pip install tensorboard, or set the key to false"
        raise SettingsError(("run.tensorboard", True, allowed))


class TensorBoard(Listener):
    """Writes an event file for ``tensorboard --logdir RUN``.

    Parameters
    ----------
    folder
        Folder of the event file; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self._accepted = 0

    def receive(self, event: Event) -> None:
        """Write the numbers of an event as scalars: progress over the steps of its stage, clients by order."""
        values = event.values
        if event.kind == "client" and values.get("outcome") == "accepted":
            self._accepted += 1
            for name in ("accuracy", "loss", "num_examples"):
                self._scalar(f"clients/{name}", values.get(name), self._accepted)
        elif event.kind == "progress":
            for name, value in values.items():
                if name not in ("done", "total", "iteration"):
                    self._scalar(f"{event.stage}/{name}", value, values["done"])
        elif event.kind == "ended":
            for name, value in values.items():
                self._scalar(f"stages/{event.stage}_{name}", value, 0)
        elif event.kind == "note" and event.stage in ("relabel", "diagnostics"):
            for name, value in values.items():
                self._scalar(f"{event.stage}/{name}", value, 0)

    def snapshot(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write images as grids, each scaled to the full range, and at each stop the number of kept patches."""
        if name == "stop" and int(tensors["row"][0]) == 0:
            iteration = int(tensors["iteration"])
            self._scalar("invert/patches_kept", tensors["kept"].shape[1], iteration)
            self._grid("invert/at_stops", tensors["images"], iteration)
        elif name == "finished":
            self._grid("invert/finished_by_class", tensors["images"], 0)

    def close(self) -> None:
        """Write the remaining values and close the file."""
        self._writer.close()

    def _scalar(self, tag: str, value: object, step: object) -> None:
        if isinstance(value, int | float) and isinstance(step, int | float):
            self._writer.add_scalar(tag, float(value), int(step))

    def _grid(self, tag: str, images: Tensor, step: int) -> None:
        pixels = images.detach().cpu().float()
        low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
        shown = (pixels - low) / (high - low).clamp_min(1e-6)
        shown = shown[:, :3] if shown.shape[1] >= 3 else shown[:, :1]
        self._writer.add_images(tag, torch.clamp(shown, 0, 1), step)
