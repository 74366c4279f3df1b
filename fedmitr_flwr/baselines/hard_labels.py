"""FedMITR with hard labels everywhere: the ensemble's most probable class instead of its distribution.

Both where the student learns from the full images and where it learns from the low-density patches.
"""

from __future__ import annotations

from fedmitr_flwr.baselines.common import FedMITRWith

hard_labels = FedMITRWith({"distill.labels": "hard", "relabel.labels": "hard"})
"""See `pipeline.run_pipeline`."""
