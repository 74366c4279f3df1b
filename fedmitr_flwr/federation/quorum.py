"""The number of clients that answered, and whether it is enough to continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedmitr_flwr.settings import RunSettings

_POLL_SECONDS = 0.2


class QuorumError(RuntimeError):
    """Too few clients connected or answered."""


@dataclass(frozen=True)
class ClientCounts:
    """The number of clients with each outcome.

    Attributes
    ----------
    asked
        Clients that the train message was sent to.
    accepted
        Clients whose upload is used.
    refused
        Clients whose upload failed the validation.
    failed
        Clients that raised an error, died, or did not answer before the deadline.
    empty
        Clients that reported that they have no data.
    """

    asked: int
    accepted: int = 0
    refused: int = 0
    failed: int = 0
    empty: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return dict(vars(self))

    def __str__(self) -> str:
        return (
            f"{self.asked} asked, {self.accepted} accepted, {self.refused} refused, "
            f"{self.failed} failed or silent, {self.empty} without data"
        )


def check_quorum(counts: ClientCounts, settings: RunSettings) -> None:
    """Check the counts against `run.min-clients` and `run.min-fraction`.

    Raises
    ------
    QuorumError
        If they are too low. The message has the counts and the key.
    """
    answered = counts.accepted + counts.empty
    if counts.accepted + counts.refused + counts.empty == 0:
        raise QuorumError(f"no client answered with an upload: {counts}")
    if counts.accepted < settings.min_clients:
        raise QuorumError(f"too few uploads: {counts}; run.min-clients = {settings.min_clients}")
    if answered < settings.min_fraction * counts.asked:
        raise QuorumError(
            f"too few clients answered ({answered} of {counts.asked}): {counts}; "
            f"run.min-fraction = {settings.min_fraction}"
        )


def wait_for_nodes(connected: Callable[[], Iterable[int]], settings: RunSettings) -> list[int]:
    """Wait until at least `run.min-clients` nodes are connected and their number no longer changes.

    Parameters
    ----------
    connected
        Returns the ids of the connected nodes: ``get_node_ids`` of a Flower grid.
    settings
        `run.min-clients` and `run.wait-nodes-seconds`.

    Returns
    -------
    node_ids
        All connected nodes, sorted.

    Raises
    ------
    QuorumError
        If fewer are connected after `run.wait-nodes-seconds`.
    """
    deadline = time.monotonic() + settings.wait_nodes_seconds
    seen = -1
    while True:
        nodes = sorted(connected())
        if len(nodes) >= settings.min_clients:
            # Flower connects simulated nodes one by one, so wait until two looks give the same number.
            if len(nodes) == seen:
                return nodes
        elif time.monotonic() >= deadline:
            raise QuorumError(
                f"{len(nodes)} nodes connected within run.wait-nodes-seconds = {settings.wait_nodes_seconds:g}; "
                f"run.min-clients = {settings.min_clients}"
            )
        seen = len(nodes)
        time.sleep(_POLL_SECONDS)
