"""Keeps the tensors that stages show, for pictures made after the run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedmitr_flwr.runs.observer import Event, Listener


class Keeper(Listener):
    """Keeps snapshots on the CPU, in order.

    Attributes
    ----------
    shots
        For each name the snapshots under it.
    """

    def __init__(self) -> None:
        self.shots: dict[str, list[dict[str, Tensor]]] = {}

    def receive(self, event: Event) -> None:
        """Drop what an earlier round showed when the next one begins to invert."""
        if event.kind == "started" and event.stage == "invert":
            self.shots = {name: shots for name, shots in self.shots.items() if name == "ensemble"}

    def snapshot(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors."""
        copies = {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}
        self.shots.setdefault(name, []).append(copies)
