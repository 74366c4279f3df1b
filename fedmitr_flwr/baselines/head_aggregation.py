"""Class-wise head aggregation: the mean update of the body, and each class's head row by who knows the class.

The rows are weighted with `ensemble.weighting` and `ensemble.power`, the body is scaled by `distill.merge-scale`: the
model that FedMITR's student starts from under ``distill.start = "merged"``, taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmitr_flwr.averaging import merged
from fedmitr_flwr.baselines.common import untrained_result
from fedmitr_flwr.checkpoints import Checkpoints
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.pipeline import ClientModel, PipelineResult
from fedmitr_flwr.settings import Settings


def head_aggregation(
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
    """Merge the uploads; nothing is trained, so `seed` is without effect. See `pipeline.run_pipeline`."""
    result = untrained_result(settings, spec, clients, initial, device)
    states = [client.state for client in clients]
    weights = result.ensemble.weights.cpu()
    return replace(result, state=merged(initial, states, weights, settings.distill.merge_scale))
