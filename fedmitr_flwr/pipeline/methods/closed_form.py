"""The common initialisation with a classifier head computed from the clients' feature moments.

``lda`` is the linear discriminant, ``ridge`` regularised least squares; `ensemble.moments` has the formulas and
sources. Both equal centralised training of the head on the pooled features, so label skew has no effect on them. The
clients' weights are used only for the models that the evaluation compares.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedmitr_flwr.data.classes import listed
from fedmitr_flwr.ensemble.moments import Head, PooledMoments, discriminant_head, pool, ridge_head
from fedmitr_flwr.models.build import build_model
from fedmitr_flwr.models.moments import check_one_head
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import Method, untrained_result


def linear_discriminant(inputs: PipelineInputs) -> PipelineResult:
    """Compute a discriminant head; see `fedmitr.run_pipeline`. Nothing is trained, so the seed has no effect.

    Raises
    ------
    ValueError
        If a client did not share its moments.
    SettingsError
        If the model has two heads.
    """
    chosen = inputs.settings.moments
    head = discriminant_head(pooled_moments(inputs), chosen.shrinkage, equal_priors=chosen.prior == "equal")
    return _with_head(inputs, head)


def least_squares(inputs: PipelineInputs) -> PipelineResult:
    """Compute a least-squares head; see `linear_discriminant`."""
    return _with_head(inputs, ridge_head(pooled_moments(inputs), inputs.settings.moments.ridge))


def pooled_moments(inputs: PipelineInputs) -> PooledMoments:
    """Return the moments of all clients together, where the images of a client count as often as in FedAvg.

    A claimed number of images that is bounded (`bounds.bounded_counts`) scales the client's moments down.

    Raises
    ------
    ValueError, SettingsError
        As `linear_discriminant`.
    """
    check_one_head(build_model(inputs.settings.model, inputs.spec), inputs.settings.model.name)
    shared = [upload.moments for upload in inputs.uploads if upload.moments is not None]
    if len(shared) < len(inputs.uploads):
        raise ValueError(f"run.method = {inputs.settings.run.method} needs the feature moments of every client")
    claimed = torch.tensor([upload.num_examples for upload in inputs.uploads], dtype=torch.float64)
    pooled = pool(shared, inputs.num_examples.double() / claimed)
    absent = [name for name, there in zip(inputs.spec.class_names, pooled.present.tolist(), strict=True) if not there]
    inputs.observer.event("moments", images=f"{float(pooled.counts.sum()):.0f}", classes=int(pooled.present.sum()))
    if absent:
        warning = f"no client has images of {len(absent)} classes, which the model never predicts: {listed(absent, 6)}"
        inputs.observer.event("moments", warning=warning)
    return pooled


def _with_head(inputs: PipelineInputs, head: Head) -> PipelineResult:
    state = dict(inputs.initial)
    state |= {"head.weight": head.weight.float(), "head.bias": head.bias.float()}
    return replace(untrained_result(inputs), state=state)


def _made(head: str) -> str:
    return (
        "It added up the clients' feature moments (counts, sums and second moments of the features of the common "
        f"initialisation) and computed {head} from them. This model is the common initialisation with that head. The "
        "server trained nothing, and the clients' weights are not part of this model."
    )


LDA = Method(
    linear_discriminant,
    "a linear discriminant of pooled feature moments (as in FedCGS, [arXiv 2503.06962]"
    "(https://arxiv.org/abs/2503.06962), and GH-OFL, [arXiv 2602.01186](https://arxiv.org/abs/2602.01186))",
    lambda settings: _made(f"a linear discriminant with shrinkage {settings.moments.shrinkage:g} of the covariance"),
    distils=False,
    inverts=False,
)
RIDGE = Method(
    least_squares,
    "pooled least squares on feature moments (as in AFL, [arXiv 2405.16240](https://arxiv.org/abs/2405.16240))",
    lambda settings: _made(f"a least-squares classifier with regularisation {settings.moments.ridge:g}"),
    distils=False,
    inverts=False,
)
