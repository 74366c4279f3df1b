"""Merging of the uploads' weights: class-wise head aggregation, task arithmetic, ACE-Merging and WUDI-Merging.

Class-wise head aggregation averages the client updates, with class-wise weights for the rows of the head. The weights
are those of `ensemble.weighting` and `ensemble.power`. The mean update of all other weights is scaled by
`distill.merge-scale`. The other methods differ in how they merge all but the head.

`ensemble.merging` has formulas, sources and departures. Each model is the one from which FedMITR's student starts with
the same name in `distill.start`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import Method, untrained_result
from fedmitr_flwr.pipeline.starts import STARTS


def merged_by(start: str, inputs: PipelineInputs) -> PipelineResult:
    """Merge the uploads as a start of the student does; see `fedmitr.run_pipeline`. The seed has no effect."""
    result = untrained_result(inputs)
    return replace(result, state=STARTS[start](inputs, result.ensemble))


def _sentence(how: str) -> str:
    return (
        f"It merged the uploaded weights {how}. For each class, it averaged the row of the classifier head with the "
        "clients' weights for this class. It distilled nothing."
    )


HEAD_AGGREGATION = Method(
    partial(merged_by, "merged"),
    "averaging with class-wise weights for the classifier head",
    lambda settings: (
        "It averaged the uploaded weights. For each class, it averaged the row of the classifier head with the "
        "clients' weights for this class. It distilled nothing."
    ),
    distils=False,
    inverts=False,
)
TASK_ARITHMETIC = Method(
    partial(merged_by, "task-arithmetic"),
    "task arithmetic ([arXiv 2212.04089](https://arxiv.org/abs/2212.04089))",
    lambda settings: _sentence(f"by adding {settings.distill.task_scale:g} times the sum of their changes"),
    distils=False,
    inverts=False,
)
ACE_MERGING = Method(
    partial(merged_by, "ace-merging"),
    "ACE-Merging ([arXiv 2603.02945](https://arxiv.org/abs/2603.02945))",
    lambda settings: _sentence("by input covariances estimated from their changes"),
    distils=False,
    inverts=False,
)
WUDI_MERGING = Method(
    partial(merged_by, "wudi-merging"),
    "WUDI-Merging ([arXiv 2503.08099](https://arxiv.org/abs/2503.08099))",
    lambda settings: _sentence("so that their changes interfere little with each other"),
    distils=False,
    inverts=False,
)
