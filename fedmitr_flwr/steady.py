"""Iterations of inversion as a CUDA graph: launching a small ViT's kernels takes longer than running them.

Between two stops every iteration runs the same kernels on the same memory. On a GPU the first few of such a stretch run
as they are, on a stream of their own; the next one is recorded, and all from there on are one launch each. A graph sees
no number of the host: what changes from iteration to iteration (bias correction, the iteration's number) comes from a
table on the device, in which each iteration moves on by one row.

Letters: B images, n iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fedmitr_flwr.cuda_graph import GraphRunner
from fedmitr_flwr.ensemble import Ensemble
from fedmitr_flwr.settings import InversionSettings
from fedmitr_flwr.terms import Term

DEVICE = "cuda"
MIN_STEPS = 20
"""Iterations of a stretch from which on a graph is used: recording one costs about as much as two iterations, and each
after it gains the time between two launches."""

Body = Callable[[Tensor, Tensor], Tensor]
"""An iteration, given its row of the table, ``(2,)``, and its number, ``()`` int64: the ``(B,)`` losses. It reads and
changes memory that stays in place, and nothing of the host."""


def stretches(stops: Iterable[int], growths: Iterable[int], iterations: int) -> dict[int, int]:
    """First iteration and length of every stretch in which the same patches are inverted; a stop belongs to none.

    Parameters
    ----------
    stops, growths
        Iterations in whose middle patches leave, and before which they change.
    iterations
        In all.
    """
    ends, changes = sorted(stops), sorted(growths)
    found = {}
    for start in sorted({0, *changes, *(stop + 1 for stop in ends)}):
        following = [*(end for end in ends if end >= start), *(change for change in changes if change > start)]
        found[start] = min([*following, iterations]) - start
    return {start: length for start, length in found.items() if length > 0}


def suits(
    length: int, ensemble: Ensemble, settings: InversionSettings, terms: Sequence[Term], device: torch.device
) -> bool:
    """Whether a stretch is run as a graph: the one place for this rule.

    It is on a CUDA device, has `MIN_STEPS` iterations, all of which see the images as they are, once, nothing but
    cross-entropy and prior is in the loss, and the teachers' weights stay packed. A device that could not record a
    graph is not asked again.
    """
    as_they_are = settings.jitter == 0 and settings.color_shift == 0 and settings.copies == 1
    fit = length >= MIN_STEPS and as_they_are and not terms and ensemble.held
    return fit and device.type == DEVICE and GraphRunner.works


class SteadySteps:
    """The iterations of a stretch, one a call.

    Parameters
    ----------
    body
        One of them.
    table
        ``(n, 2)`` on the CPU, a row for each.
    first
        Number of the first.
    ensemble
        Whose memory the body writes to.
    device
        Where it runs.
    """

    def __init__(self, body: Body, table: Tensor, first: int, ensemble: Ensemble, device: torch.device) -> None:
        self._body, self._first, self.left = body, first, len(table)
        pinned = table.pin_memory() if device.type == "cuda" else table
        self._table = pinned.to(device, non_blocking=True)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._run = GraphRunner(self._advance, device, lambda: ensemble.buffers)

    def __call__(self) -> Tensor:
        """Run the next of the `left` iterations; its ``(B,)`` losses, in memory that the one after leaves alone."""
        self.left -= 1
        return self._run().clone()

    def _advance(self) -> Tensor:
        loss = self._body(self._table.index_select(0, self._row)[0], self._row[0] + self._first)
        self._row += 1
        return loss
