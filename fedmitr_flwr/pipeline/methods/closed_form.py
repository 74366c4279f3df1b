"""The common initialisation with a classifier head computed from the clients' feature moments.

``lda`` is the linear discriminant, ``ridge`` regularised least squares; `ensemble.moments` has the formulas and
sources. Both equal centralised training of the head on the pooled features, so label skew has no effect on them. The
clients' weights are used only for the models that the evaluation compares.
"""

from __future__ import annotations

from dataclasses import replace

from fedmitr_flwr.ensemble.moments import ridge_head
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import Method, untrained_result
from fedmitr_flwr.pipeline.shared_moments import discriminant, pooled_moments, with_head


def linear_discriminant(inputs: PipelineInputs) -> PipelineResult:
    """Compute a discriminant head; see `fedmitr.run_pipeline`. Nothing is trained, so the seed has no effect.

    Raises
    ------
    ValueError
        If a client did not share its moments.
    SettingsError
        If the model has two heads.
    """
    state = with_head(inputs, discriminant(inputs, pooled_moments(inputs)))
    return replace(untrained_result(inputs), state=state)


def least_squares(inputs: PipelineInputs) -> PipelineResult:
    """Compute a least-squares head; see `linear_discriminant`."""
    state = with_head(inputs, ridge_head(pooled_moments(inputs), inputs.settings.moments.ridge))
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
