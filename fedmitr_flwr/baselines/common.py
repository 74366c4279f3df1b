"""What baselines share: FedMITR under other settings, or a result without inversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmitr_flwr.averaging import fedavg
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.pipeline import ClientModel, PipelineResult, make_ensemble, run_pipeline
from fedmitr_flwr.settings import RunConfigValue, Settings


@dataclass(frozen=True)
class FedMITRWith:
    """FedMITR with some settings changed, whatever the run-config says of them.

    Attributes
    ----------
    changes
        Keys and values, ``{"run.seed": 7}``.
    """

    changes: Mapping[str, RunConfigValue]

    def __call__(self, settings: Settings, *args: Any, **kwargs: Any) -> PipelineResult:
        """See `pipeline.run_pipeline`."""
        return run_pipeline(settings.replace(**self.changes), *args, **kwargs)


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
