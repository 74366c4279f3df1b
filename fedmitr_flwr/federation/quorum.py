"""How many clients answered, and whether that is enough to go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedmitr_flwr.settings import RunSettings

_POLL_SECONDS = 0.2


class QuorumError(RuntimeError):
    """Too few clients for the run to mean anything."""


@dataclass(frozen=True)
class ClientCounts:
    """What became of the clients that were asked to train.

    Attributes
    ----------
    asked
        Clients that got the train message.
    accepted
        Those whose upload is used.
    refused
        Those whose upload failed the validation.
    failed
        Those that raised, died, or did not answer in time.
    empty
        Those that said they have no data.
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
    """Check `run.min-clients` and `run.min-fraction`.

    Raises
    ------
    QuorumError
        Says what came and which key it falls short of.
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
    """Wait until `run.min-clients` nodes are connected and no more are coming in at this moment.

    Parameters
    ----------
    connected
        Looks which nodes there are: a Flower grid's ``get_node_ids``.
    settings
        `run.min-clients` and `run.wait-nodes-seconds`.

    Returns
    -------
    node_ids
        All connected nodes, sorted.

    Raises
    ------
    QuorumError
        If there are too few when the time is over.
    """
    deadline = time.monotonic() + settings.wait_nodes_seconds
    seen = -1
    while True:
        nodes = sorted(connected())
        if len(nodes) >= settings.min_clients:
            # Simulated nodes are registered one by one while we look: take them when their number holds still.
            if len(nodes) == seen:
                return nodes
        elif time.monotonic() >= deadline:
            raise QuorumError(
                f"{len(nodes)} nodes connected within run.wait-nodes-seconds = {settings.wait_nodes_seconds:g}; "
                f"run.min-clients = {settings.min_clients}"
            )
        seen = len(nodes)
        time.sleep(_POLL_SECONDS)
