"""One-shot FedAvg (McMahan et al. 2017, arXiv 1602.05629): the mean of the uploads, weighted by numbers of examples."""

from __future__ import annotations

from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.common import Method, untrained_result


def one_shot_fedavg(inputs: PipelineInputs) -> PipelineResult:
    """Average the uploads; see `fedmitr.run_pipeline`. Nothing is trained, so the seed has no effect."""
    return untrained_result(inputs)


FEDAVG = Method(
    one_shot_fedavg,
    "one-shot FedAvg",
    lambda settings: "It averaged the uploaded weights by the clients' numbers of images. It distilled nothing.",
    distils=False,
    inverts=False,
)
