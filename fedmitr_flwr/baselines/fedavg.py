"""One-shot FedAvg (McMahan et al. 2017, arXiv 1602.05629): the mean of the weights by number of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmitr_flwr.baselines.common import untrained_result
from fedmitr_flwr.checkpoints import Checkpoints
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.pipeline import ClientModel, PipelineResult
from fedmitr_flwr.settings import Settings


def one_shot_fedavg(
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
    """Average the uploads; nothing is trained, so `seed` is without effect. See `pipeline.run_pipeline`."""
    return untrained_result(settings, spec, clients, initial, device)
