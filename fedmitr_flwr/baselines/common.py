"""What baselines without inversion share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmitr_flwr.averaging import fedavg
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.pipeline import ClientModel, PipelineResult, make_ensemble
from fedmitr_flwr.settings import Settings


def untrained_result(
    settings: Settings,
    spec: ImageSpec,
    clients: Sequence[ClientModel],
    initial: Mapping[str, Tensor],
    device: torch.device,
) -> PipelineResult:
    """Ensemble and one-shot average, which every method is compared with; the average is the global model too."""
    ensemble, _ = make_ensemble(settings, spec, clients, initial, device)
    average = fedavg([client.state for client in clients], torch.tensor([client.num_examples for client in clients]))
    return PipelineResult(dict(average), average, ensemble, None, None, None, {})
