"""Dense inversion with distillation: DeepInversion (Yin et al. 2020, arXiv 1912.08795) of the ensemble.

Every patch of every image is optimised in every iteration, and the whole image is distilled; nothing is split or
relabeled. Departures: a ViT has no batch normalisation, so the term on its statistics is absent; the remaining
constants (`inversion.*`) are the run's own, so that sparse and dense are compared at the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmitr_flwr.checkpoints import Checkpoints
from fedmitr_flwr.data import ImageSpec
from fedmitr_flwr.observe import Observer
from fedmitr_flwr.pipeline import ClientModel, PipelineResult, run_pipeline
from fedmitr_flwr.settings import RunConfigValue, Settings

_DENSE: dict[str, RunConfigValue] = {
    "inversion.stops": "",
    "inversion.fractions": "",
    "relabel.labels": "off",
    "distill.low-weight": 0.0,
    "distill.ce-on": "full",
}


def dense_inversion(
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
    """Distil KL to the ensemble and cross-entropy with the pseudo-label. See `pipeline.run_pipeline`."""
    dense = settings.replace(**_DENSE)
    return run_pipeline(
        dense, spec, clients, initial, seed=seed, device=device, observer=observer, checkpoints=checkpoints
    )


def dense_inversion_kl(
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
    """Distil KL to the ensemble alone. See `pipeline.run_pipeline`."""
    dense = settings.replace(**_DENSE, **{"distill.ce-weight": 0.0})
    return run_pipeline(
        dense, spec, clients, initial, seed=seed, device=device, observer=observer, checkpoints=checkpoints
    )
