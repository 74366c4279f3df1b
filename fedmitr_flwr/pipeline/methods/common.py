"""What a method of `run.method` is, and what the baselines share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.pipeline.inputs import Pipeline, PipelineInputs, PipelineResult
from fedmitr_flwr.pipeline.steps import make_ensemble
from fedmitr_flwr.settings import RunConfigValue, Settings


@dataclass(frozen=True)
class Method:
    """A way from uploads to one global model, and everything that the rest of the program must know about it.

    Attributes
    ----------
    pipeline
        Turns uploads into a model.
    title
        What the model card and the report call the method; Markdown.
    server_part
        Returns one sentence on what the server did with the uploads, given the resolved settings.
    changes
        Settings that the method fixes, whatever the run-config says: ``{"distill.labels": "hard"}``.
    distils
        Whether a student is trained. False for methods that only average.
    inverts
        Whether images are inverted from the teachers.
    generates
        Whether a generator is trained. Its arithmetic is not counted.
    """

    pipeline: Pipeline
    title: str
    server_part: Callable[[Settings], str]
    changes: Mapping[str, RunConfigValue] = field(default_factory=dict)
    distils: bool = True
    inverts: bool = True
    generates: bool = False

    def resolve(self, settings: Settings) -> Settings:
        """Return the settings with those that the method fixes."""
        return settings.replace(**self.changes) if self.changes else settings

    def __call__(self, inputs: PipelineInputs) -> PipelineResult:
        """Run the method under its resolved settings; see `fedmitr.run_pipeline`."""
        return self.pipeline(replace(inputs, settings=self.resolve(inputs.settings)))


def untrained_result(inputs: PipelineInputs, ensemble: Ensemble | None = None) -> PipelineResult:
    """Return the ensemble and the one-shot average as a result whose global model is that average."""
    ensemble = ensemble or make_ensemble(inputs)[0]
    average = inputs.average()
    return PipelineResult(dict(average), average, ensemble, None, None, None, {})
