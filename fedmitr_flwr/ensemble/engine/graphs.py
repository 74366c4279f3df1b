"""State that the CUDA graphs of an ensemble share."""

from __future__ import annotations

import torch


class Graphs:
    """State of the CUDA graphs of one ensemble and of the ensembles drawn from it.

    Attributes
    ----------
    works
        False after a recording failed, so that no further recording is tried.
    """

    def __init__(self) -> None:
        self.works = True
        self._stream: torch.cuda.Stream | None = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream on which all graphs are recorded, so that each reuses the memory freed by the last one.

        Parameters
        ----------
        device
            The ensemble's CUDA device.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream
