"""The models that a run compares, and the metrics besides accuracy that are computed for them.

A metric is one function and one entry of `METRICS`. It is computed for one-shot FedAvg, the ensemble and the global
model. It is shown in ``metrics.json``, the report, the model card and by ``fedmitr evaluate``. PyTorch is imported only
where a metric is computed, so that commands that show finished runs stay fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MODELS = {
    "local_mean": "local models, mean",
    "fedavg": "one-shot FedAvg",
    "ensemble": "ensemble",
    "global": "global model",
}
"""Keys of the four accuracies in ``metrics.json``, and the names that are shown."""


@dataclass(frozen=True)
class Metric:
    """A number computed from a model's predictions on held-out images.

    Attributes
    ----------
    name
        Key in ``metrics.json``.
    title
        Name that is shown.
    note
        One sentence that explains the metric.
    compute
        Computes the metric from labels ``(N,)`` int64 and probabilities ``(N, C)`` fp32, N at least 1.
    percent
        Whether the value is shown as a percentage.
    """

    name: str
    title: str
    note: str
    compute: Callable[[Tensor, Tensor], float]
    percent: bool = True

    def text(self, value: float | None) -> str:
        """Format a value; None as a dash."""
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


def balanced_accuracy(labels: Tensor, probabilities: Tensor) -> float:
    """Return the fraction of correctly classified images of each class, averaged over the classes with images."""
    import torch

    C = probabilities.shape[1]
    hits = torch.bincount(labels[probabilities.argmax(1) == labels], minlength=C)
    counts = torch.bincount(labels, minlength=C)
    present = counts > 0
    return float((hits[present] / counts[present]).mean())


def calibration_error(labels: Tensor, probabilities: Tensor) -> float:
    """Return the expected calibration error in 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    return float(multiclass_calibration_error(probabilities, labels, num_classes=probabilities.shape[1], n_bins=15))


METRICS: tuple[Metric, ...] = (
    Metric(
        "balanced_accuracy",
        "balanced accuracy",
        "The fraction of correctly classified images of each class, averaged over the classes.",
        balanced_accuracy,
    ),
    Metric(
        "calibration_error",
        "calibration error",
        "The difference between the confidence and the accuracy of a model, averaged over its predictions; 0 is best.",
        calibration_error,
    ),
)


def computed(labels: Tensor, probabilities: Tensor) -> dict[str, float]:
    """Return all metrics of one model by name."""
    return {metric.name: metric.compute(labels, probabilities) for metric in METRICS}
