"""Class-wise head aggregation: the mean update of the body, and each class's head row by who knows the class.

The rows are weighted with `ensemble.weighting` and `ensemble.power`, the body is scaled by `distill.merge-scale`: the
model that FedMITR's student starts from under ``distill.start = "merged"``, taken as it is.
"""

from __future__ import annotations

from dataclasses import replace

from fedmitr_flwr.ensemble.averaging import merged
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import Method, untrained_result


def head_aggregation(inputs: PipelineInputs) -> PipelineResult:
    """Merge the uploads; nothing is trained, so the seed is without effect. See `pipeline.run_pipeline`."""
    result = untrained_result(inputs)
    weights = result.ensemble.weights.cpu()
    return replace(result, state=merged(inputs.initial, inputs.states, weights, inputs.settings.distill.merge_scale))


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
