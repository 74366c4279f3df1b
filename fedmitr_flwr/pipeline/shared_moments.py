"""What a pipeline makes of the feature moments that clients share: pooled moments, and models with a closed-form head.

`ensemble.moments` has the formulas. Letters: K clients, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmitr_flwr.data.classes import listed
from fedmitr_flwr.ensemble.moments import Head, PooledMoments, discriminant_head, pool
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.moments import check_one_head
from fedmitr_flwr.pipeline.inputs import PipelineInputs


def pooled_moments(inputs: PipelineInputs) -> PooledMoments:
    """Return the moments of all clients together, where the images of a client count as often as in FedAvg.

    A claimed number of images that is bounded (`bounds.bounded_counts`) scales the client's moments down.

    Raises
    ------
    ValueError
        If a client did not share its moments.
    SettingsError
        If the model has two heads.
    """
    check_one_head(build_model(inputs.settings.model, inputs.spec), inputs.settings.model.name)
    shared = [upload.moments for upload in inputs.uploads if upload.moments is not None]
    if len(shared) < len(inputs.uploads):
        raise ValueError("train.share-moments = true needs the feature moments of every client")
    claimed = torch.tensor([upload.num_examples for upload in inputs.uploads], dtype=torch.float64)
    return pool(shared, inputs.num_examples.double() / claimed)


def discriminant(inputs: PipelineInputs, pooled: PooledMoments, scale: float = 1.0) -> Head:
    """Return the linear discriminant of the settings `moments`; `scale` is a factor on its logits."""
    chosen = inputs.settings.moments
    return discriminant_head(pooled, chosen.shrinkage, equal_priors=chosen.prior == "equal", scale=scale)


def with_head(inputs: PipelineInputs, head: Head) -> dict[str, Tensor]:
    """Return the state dict of the common initialisation with another classifier head."""
    return {**inputs.initial, "head.weight": head.weight.float(), "head.bias": head.bias.float()}


def expert_state(inputs: PipelineInputs, pooled: PooledMoments) -> dict[str, Tensor]:
    """Return the weights of the ensemble's expert: the initialisation with a linear discriminant as its head.

    Its logits are those of the discriminant times `ensemble.moments-weight`; with a weight of 0 they are not scaled.
    """
    return with_head(inputs, discriminant(inputs, pooled, inputs.settings.ensemble.moments_weight or 1.0))


def report_moments(inputs: PipelineInputs) -> None:
    """Log how many images and classes the moments are of, and name the classes of which there are none.

    Raises
    ------
    ValueError, SettingsError
        As `pooled_moments`.
    """
    pooled = pooled_moments(inputs)
    inputs.observer.event("moments", images=f"{float(pooled.counts.sum()):.0f}", classes=int(pooled.present.sum()))
    names = zip(inputs.spec.class_names, pooled.present.tolist(), strict=True)
    absent = [name for name, there in names if not there]
    if absent:
        warning = f"no client has images of {len(absent)} classes, which are never predicted: {listed(absent, 6)}"
        inputs.observer.event("moments", warning=warning)
