"""FedMITR with hard labels: the ensemble's most probable class instead of its distribution.

This applies to full images and to low-density patches. The loss terms on the outputs of each teacher
(`distill.feature-weight`, `distill.teacher-weight`) are left out, because their targets are not hard labels.
"""

from __future__ import annotations

from fedmitr_flwr.pipeline.methods.common import Method
from fedmitr_flwr.pipeline.methods.fedmitr import CITATION, inverted_images, run_pipeline

HARD_LABELS = Method(
    run_pipeline,
    f"{CITATION} with hard labels instead of soft labels",
    inverted_images,
    {
        "distill.labels": "hard",
        "relabel.labels": "hard",
        "distill.feature-weight": 0.0,
        "distill.teacher-weight": 0.0,
    },
)
