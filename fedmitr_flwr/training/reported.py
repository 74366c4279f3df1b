"""The numbers that a client reports beside its weights and its number of images.

Client, server and report read this one list: the client computes each number, the server refuses an upload whose number
is missing, not finite or out of range, stores it with the upload and logs its mean, and the report shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmitr_flwr.training.upload import ClientTask, ClientUpload


@dataclass(frozen=True)
class Reported:
    """A number that each client reports.

    Attributes
    ----------
    name
        Its key on the wire, in ``metrics.jsonl`` and in the stored upload; a Python identifier.
    title
        Its column in the report.
    compute
        Computes it from the upload that is about to be sent.
    least, most
        The range that the server accepts.
    percent
        Whether the report shows it as a percentage.
    """

    name: str
    title: str
    compute: Callable[[ClientUpload, ClientTask], float]
    least: float = -math.inf
    most: float = math.inf
    percent: bool = False

    def text(self, value: float | None) -> str:
        """Write a value for a reader; a dash if there is none."""
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


REPORTED: tuple[Reported, ...] = (
    Reported("loss", "training loss", lambda upload, task: upload.loss),
    Reported("accuracy", "training accuracy", lambda upload, task: upload.accuracy, 0.0, 1.0, percent=True),
)
