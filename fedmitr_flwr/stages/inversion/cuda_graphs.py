"""Run the iterations of inversion as a CUDA graph, because launching a small ViT's kernels takes longer than they run.

Between two stops every iteration runs the same kernels on the same memory. The first iterations of such a stretch run
normally, on a separate CUDA stream. The next one is recorded as a graph, and each one from then on is a single launch.
A graph cannot read values from the host. Values that differ between iterations (Adam's bias correction, the number of
the iteration) are therefore rows of a table on the device, and each iteration moves to the next row.

Letters: B images, n iterations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fedmitr_flwr.ensemble.engine.graphs import Graphs
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.ensemble.loss_terms import Term
from fedmitr_flwr.settings import InversionSettings

log = logging.getLogger("fedmitr.inversion")

DEVICE = "cuda"
MIN_STEPS = 20
"""Least number of iterations for which a graph is recorded. A recording costs about as much as two iterations, and each
later iteration saves the time between two launches."""
WARM_UP = 3
"""Number of normal calls before the recording, so that memory is allocated and libraries are loaded by then."""

Body = Callable[[Tensor, Tensor], Tensor]
"""One iteration: takes its row of the table, ``(2,)``, and its number, ``()`` int64, and returns the ``(B,)`` losses.
It uses the same memory in each call and reads no value from the host."""


def stretches(stops: Iterable[int], growths: Iterable[int], iterations: int) -> dict[int, int]:
    """Return the first iteration and the length of each stretch in which the set of inverted patches is constant.

    Parameters
    ----------
    stops
        Iterations that exclude patches. They are part of no stretch.
    growths
        Iterations before which the set of patches changes. A stretch may start with one.
    iterations
        Total number of iterations.
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
    """Return whether a stretch runs as a graph. No other place decides this.

    All of these must hold: the device is a CUDA device; the stretch has at least `MIN_STEPS` iterations; the images are
    passed to the ensemble once and unchanged (no jitter, no colour shift, one copy); the loss has no terms besides
    cross-entropy and priors; the teachers' weights stay packed; no recording has failed for this ensemble.
    """
    unchanged = settings.jitter == 0 and settings.color_shift == 0 and settings.copies == 1
    fits = length >= MIN_STEPS and unchanged and not terms and ensemble.held
    return fits and device.type == DEVICE and ensemble.graphs.works


class SteadySteps:
    """The iterations of one stretch; each call runs the next one.

    Parameters
    ----------
    body
        One iteration.
    table
        ``(n, 2)`` on the CPU, one row for each iteration.
    first
        Number of the first iteration.
    ensemble
        The ensemble that `body` runs. Its buffers are kept for as long as the graph, which writes to them.
    device
        Device of the images.

    Attributes
    ----------
    left
        Number of iterations that have not run yet.
    """

    def __init__(self, body: Body, table: Tensor, first: int, ensemble: Ensemble, device: torch.device) -> None:
        self._body, self._first, self.left = body, first, len(table)
        pinned = table.pin_memory() if device.type == "cuda" else table
        self._table = pinned.to(device, non_blocking=True)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._run = GraphRunner(self._advance, device, lambda: ensemble.buffers, ensemble.graphs)

    def __call__(self) -> Tensor:
        """Run the next iteration and return its ``(B,)`` losses in new memory."""
        self.left -= 1
        return self._run().clone()

    def _advance(self) -> Tensor:
        loss = self._body(self._table.index_select(0, self._row)[0], self._row[0] + self._first)
        self._row += 1
        return loss


class GraphRunner:
    """A function without arguments that runs normally for the first `WARM_UP` calls and as a CUDA graph after them.

    If the recording fails, the function runs normally in all later calls, and `graphs` notes the failure.

    Parameters
    ----------
    function
        Returns a tensor. The next call may overwrite it.
    device
        A CUDA device.
    used
        Returns the buffers of other objects that the function writes to. They are kept for as long as the graph, even
        if their owners release them.
    graphs
        State shared with the other graphs of the same ensemble.
    """

    def __init__(
        self, function: Callable[[], Tensor], device: torch.device, used: Callable[[], list[Tensor]], graphs: Graphs
    ) -> None:
        self._function, self._device, self._used, self._graphs = function, device, used, graphs
        self._runs = 0
        self._recorded: tuple[Callable[[], None], Tensor, list[Tensor]] | None = None

    def __call__(self) -> Tensor:
        """Run the function once."""
        if self._runs == WARM_UP and self._graphs.works:
            try:
                self._recorded = (*self._record(), self._used())
            except RuntimeError as error:  # not enough memory, or a kernel that cannot be recorded
                self._graphs.works = False
                log.warning("a CUDA graph could not be recorded, so inversion runs without graphs (slower): %s", error)
        self._runs += 1
        if self._recorded is None:
            return self._warm()
        replay, out, _ = self._recorded
        replay()
        return out

    def _warm(self) -> Tensor:
        current, aside = torch.cuda.current_stream(self._device), self._graphs.stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            out = self._function()
        current.wait_stream(aside)
        return out

    def _record(self) -> tuple[Callable[[], None], Tensor]:
        """Record the function without running it; return what replays it, and the memory of its result."""
        current, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(current),  # restores the current stream after a failed recording
            torch.cuda.graph(graph, stream=self._graphs.stream(self._device), capture_error_mode="thread_local"),
        ):
            out = self._function()
        return graph.replay, out
