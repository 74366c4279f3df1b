"""Keep the tensors of snapshots for the pictures that are made after the run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedmitr_flwr.runs.observer import Event, Listener


class Keeper(Listener):
    """Keeps all snapshots on the CPU in order.

    Attributes
    ----------
    shots
        Snapshots by name.
    """

    def __init__(self) -> None:
        self.shots: dict[str, list[dict[str, Tensor]]] = {}

    def receive(self, event: Event) -> None:
        """Remove the snapshots of the previous round when inversion starts, except those of the ensemble."""
        if event.kind == "started" and event.stage == "invert":
            self.shots = {name: shots for name, shots in self.shots.items() if name == "ensemble"}

    def snapshot(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors to the CPU and keep them."""
        copies = {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}
        self.shots.setdefault(name, []).append(copies)
