"""FedMITR with hard labels everywhere: the ensemble's most probable class instead of its distribution.

Both where the student learns from the full images and where it learns from the low-density patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmitr_flwr.checkpoints import Checkpoints
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.pipeline import ClientModel, PipelineResult, run_pipeline
from fedmitr_flwr.settings import Settings


def hard_labels(
    settings: Settings,
    spec: ImageSpec,
    clients: Sequence[ClientModel],
    initial: Mapping[str, Tensor],
    *,
    seed: int,
    device: torch.device,
    observer: Observer,
    checkpoints: Checkpoints | None = None,
) -> PipelineResult:
    """See `pipeline.run_pipeline`."""
    hard = settings.replace(**{"distill.labels": "hard", "relabel.labels": "hard"})
    return run_pipeline(
        hard, spec, clients, initial, seed=seed, device=device, observer=observer, checkpoints=checkpoints
    )
