"""Merging of the uploads' weights: class-wise head aggregation, task arithmetic, ACE-Merging and WUDI-Merging.

Class-wise head aggregation averages the client updates, with class-wise weights for the rows of the head. The weights
are those of `ensemble.weighting` and `ensemble.power`. The mean update of all other weights is scaled by
`distill.merge-scale`. The other methods differ in how they merge all but the head.

`ensemble.merging` has formulas, sources and departures. Each model is the one from which FedMITR's student starts with
the same name in `distill.start`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import Method, untrained_result
from fedmitr_flwr.pipeline.starts import STARTS
from fedmitr_flwr.settings import Settings


def merged_by(start: str, inputs: PipelineInputs) -> PipelineResult:
    """Merge the uploads as a start of the student does; see `fedmitr.run_pipeline`. The seed has no effect."""
    result = untrained_result(inputs)
    return replace(result, state=STARTS[start](inputs, result.ensemble))


def _merging(start: str, title: str, how: Callable[[Settings], str]) -> Method:
    """Return the method whose model is a start of the student; `how` says in the model card how it merged."""

    def server_part(settings: Settings) -> str:
        return (
            f"It merged the uploaded weights {how(settings)}. For each class, it averaged the row of the classifier "
            "head with the clients' weights for this class. It distilled nothing."
        )

    return Method(partial(merged_by, start), title, server_part, distils=False, inverts=False)


HEAD_AGGREGATION = _merging(
    "merged", "averaging with class-wise weights for the classifier head", lambda settings: "by averaging"
)
TASK_ARITHMETIC = _merging(
    "task-arithmetic",
    "task arithmetic ([arXiv 2212.04089](https://arxiv.org/abs/2212.04089))",
    lambda settings: f"by adding {settings.distill.task_scale:g} times the sum of their changes",
)
ACE_MERGING = _merging(
    "ace-merging",
    "ACE-Merging ([arXiv 2603.02945](https://arxiv.org/abs/2603.02945))",
    lambda settings: "by input covariances estimated from their changes",
)
WUDI_MERGING = _merging(
    "wudi-merging",
    "WUDI-Merging ([arXiv 2503.08099](https://arxiv.org/abs/2503.08099))",
    lambda settings: "so that their changes interfere little with each other",
)
