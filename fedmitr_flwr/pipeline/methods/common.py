"""What baselines share: FedMITR under other settings, or a result without inversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.pipeline.inputs import PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.methods.fedmitr import run_pipeline
from fedmitr_flwr.pipeline.steps import make_ensemble
from fedmitr_flwr.settings import RunConfigValue


@dataclass(frozen=True)
class FedMITRWith:
    """FedMITR with some settings changed, whatever the run-config says of them.

    Attributes
    ----------
    changes
        Keys and values, ``{"run.seed": 7}``.
    """

    changes: Mapping[str, RunConfigValue]

    def __call__(self, inputs: PipelineInputs) -> PipelineResult:
        """See `pipeline.run_pipeline`."""
        return run_pipeline(replace(inputs, settings=inputs.settings.replace(**self.changes)))


def untrained_result(inputs: PipelineInputs, ensemble: Ensemble | None = None) -> PipelineResult:
    """Ensemble and one-shot average, which every method is compared with; the average is the global model too."""
    ensemble = ensemble or make_ensemble(inputs)[0]
    average = inputs.average()
    return PipelineResult(dict(average), average, ensemble, None, None, None, {})
