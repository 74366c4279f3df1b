"""What baselines share: FedMITR under other settings, or a result without inversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmitr_flwr.averaging import fedavg
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.pipeline import ClientModel, Pipeline, PipelineResult, make_ensemble, run_pipeline
from fedmitr_flwr.settings import RunConfigValue, Settings


def fedmitr_with(changes: Mapping[str, RunConfigValue]) -> Pipeline:
    """FedMITR with some settings changed, ``{"run.seed": 7}``, whatever the run-config says of them."""

    def run(settings: Settings, *args: Any, **kwargs: Any) -> PipelineResult:
        return run_pipeline(settings.replace(**changes), *args, **kwargs)

    return run


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
