"""Class-wise head aggregation: average the client updates, with class-wise weights for the rows of the head.

The weights of the rows are those of `ensemble.weighting` and `ensemble.power`. The mean update of all other weights is
scaled by `distill.merge-scale`. The result is the model from which FedMITR's student starts with
``distill.start = "merged"``.
"""

from __future__ import annotations

from dataclasses import replace

from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import Method, untrained_result


def head_aggregation(inputs: PipelineInputs) -> PipelineResult:
    """Merge the uploads; see `fedmitr.run_pipeline`. Nothing is trained, so the seed has no effect."""
    result = untrained_result(inputs)
    return replace(result, state=inputs.merged(result.ensemble.weights.cpu()))


HEAD_AGGREGATION = Method(
    head_aggregation,
    "averaging with class-wise weights for the classifier head",
    lambda settings: (
        "It averaged the uploaded weights. For each class, it averaged the row of the classifier head with the "
        "clients' weights for this class. It distilled nothing."
    ),
    distils=False,
    inverts=False,
)
