"""FedMITR with hard labels everywhere: the ensemble's most probable class instead of its distribution.

Both where the student learns from the full images and where it learns from the low-density patches. What each teacher
makes of an image (`distill.feature-weight`, `distill.teacher-weight`) is no hard label, and is left out.
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
