"""A function of fixed memory as a CUDA graph: one launch for all its kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

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
