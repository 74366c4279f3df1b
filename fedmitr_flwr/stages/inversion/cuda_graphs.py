"""Iterations of inversion as a CUDA graph: launching a small ViT's kernels takes longer than running them.

Between two stops every iteration runs the same kernels on the same memory. On a GPU the first few of such a stretch run
as they are, on a stream of their own; the next one is recorded, and all from there on are one launch each. A graph sees
no number of the host: what changes from iteration to iteration (bias correction, the iteration's number) comes from a
table on the device, in which each iteration moves on by one row.

Letters: B images, n iterations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.ensemble.loss_terms import Term
from fedmitr_flwr.settings import InversionSettings

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


log = logging.getLogger("fedmitr.inversion")


WARM_UP = 3
"""Calls that run as they are, so that all memory and libraries are there when one is recorded."""


class GraphRunner:
    """A function without arguments on a GPU, which runs as it is `WARM_UP` times and as a graph from then on.

    Parameters
    ----------
    function
        Returns a tensor, which the next call may overwrite.
    device
        A CUDA device.
    used
        Memory of others that the function writes to; it is held as long as the graph, if they should let go of it.
    """

    works = True
    """Whether no graph of this process failed so far."""

    def __init__(self, function: Callable[[], Tensor], device: torch.device, used: Callable[[], list[Tensor]]) -> None:
        self._function, self._device, self._used, self._runs = function, device, used, 0
        self._recorded: tuple[Callable[[], None], Tensor, list[Tensor]] | None = None

    def __call__(self) -> Tensor:
        """Run once."""
        if self._runs == WARM_UP and GraphRunner.works:
            try:
                self._recorded = (*self._record(), self._used())
            except RuntimeError as error:  # out of memory, or a kernel that can't be recorded
                GraphRunner.works = False
                log.warning("inversion goes on without CUDA graphs, which are faster: %s", error)
        self._runs += 1
        if self._recorded is None:
            return self._warm()
        replay, out, _ = self._recorded
        replay()
        return out

    def _warm(self) -> Tensor:
        current, aside = torch.cuda.current_stream(self._device), _stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            out = self._function()
        current.wait_stream(aside)
        return out

    def _record(self) -> tuple[Callable[[], None], Tensor]:
        """What replays the function, and the memory of what it returns; nothing runs."""
        current, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(current),  # or a recording that fails leaves another one current
            torch.cuda.graph(graph, stream=_stream(self._device), capture_error_mode="thread_local"),
        ):
            out = self._function()
        return graph.replay, out


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device, so that each can use the memory that the one before gave back."""
    return torch.cuda.Stream(device)
