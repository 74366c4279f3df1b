"""The numbers that a client reports in addition to its weights and its number of images.

Client, server and report use the same list. The client computes each number. The server refuses an upload if a number
is missing, not finite or out of range; otherwise it stores the number with the upload and logs the mean over the
clients. The report shows each number in a column.
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
        Key of the number in Flower's records, in ``metrics.jsonl`` and in the stored upload; a Python identifier.
    title
        Title of the column in the report.
    compute
        Function that computes the number from the finished upload and the task.
    least, most
        Smallest and largest value that the server accepts.
    percent
        Whether the report shows the number as a percentage.
    """

    name: str
    title: str
    compute: Callable[[ClientUpload, ClientTask], float]
    least: float = -math.inf
    most: float = math.inf
    percent: bool = False

    def text(self, value: float | None) -> str:
        """Return a value as text for the report; a dash for None."""
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


REPORTED: tuple[Reported, ...] = (
    Reported("loss", "training loss", lambda upload, task: upload.loss),
    Reported("accuracy", "training accuracy", lambda upload, task: upload.accuracy, 0.0, 1.0, percent=True),
)
"""All reported numbers, in the order of the report's columns."""
